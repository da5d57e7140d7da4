"""What a training step of a text-to-image model needs: passes of the network, memory and time, by the loss.

    python benchmarks/text_cost.py --family sdxl --resolution 1024 --rank 16 --batch_size 1 [--checkpointing]
    python benchmarks/text_cost.py --family sd --resolution 512 --rank 0 --batch_size 4

The networks have the sizes of Stable Diffusion 1.5, Stable Diffusion XL and Flux, and random weights; latents and
prompts are random numbers, as a cache would hold them. `--rank 0` trains the whole network. "plain" is the denoising
loss, "consistency" a step that carries that loss; "on average" is what a quarter of the samples comes to, with the rows
of train_consistency.py; "observation" is an update of the network and one of the discriminator.

Work: passes of a sample, 1 forward and 2 backward (3 with checkpointing, which computes once more), as a ratio to a
plain step; calls: the same for a call of the network, whatever the number of its samples. Time lies between the two: a
GPU that is filled takes as long as the work, one that waits for the host as long as the calls. On a GPU: time, and the
peak of the memory in all, in bfloat16, under `torch.cuda.set_sync_debug_mode("error")`. Without one: tensors on the
meta device, whose bytes are counted, in bfloat16: weights, moments and gradients, and what the graph of a step holds
for its backward pass.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import diffusers
import torch
from bench import DEVICE, flags, in_turn, machine, ratio
from diffusers import UNet2DConditionModel
from torch import Tensor

import diffusers_ext as ext
from diffusers_ext.noise_levels import look_ahead_sigma
from diffusers_ext.reports.card import table
from diffusers_ext.subjects.lora import LAYERS, Lora, add_lora, config_of
from diffusers_ext.training.batch import part_of

PLACE = "cuda" if DEVICE == "cuda" else "meta"
CROSS, UP = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
SD = {
    "down_block_types": (*CROSS * 3, "DownBlock2D"), "up_block_types": ("UpBlock2D", *UP * 3), "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "sample_size": 64,
}  # fmt: skip
XL = {
    "down_block_types": ("DownBlock2D", *CROSS * 2), "up_block_types": (*UP * 2, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
}  # fmt: skip


class Step:
    """One optimiser step by each loss."""

    def __init__(self, args: Namespace) -> None:
        family, side, n = args.family, args.resolution // 8, args.batch_size
        made = torch.bfloat16 if args.rank else torch.float32
        with torch.device(PLACE):
            torch.set_default_dtype(made)
            self.network = (
                diffusers.FluxTransformer2DModel(guidance_embeds=True)
                if family == "flux"
                else (UNet2DConditionModel(**(SD if family == "sd" else XL)))
            )
            torch.set_default_dtype(torch.float32)
            if args.rank:
                kind = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "flux": "Flux"}[family]
                add_lora(self.network, config_of(Lora(args.rank, layers=LAYERS[kind]), kind))
            self.cond, shape = self.conditions(family, n, side, made)
            self.x0 = torch.randn(n, *shape)
            self.disc = ext.NoiseLevelDiscriminator(4, sigma_data=1.0)
        if args.checkpointing:
            self.network.enable_gradient_checkpointing()
        flow = family == "flux"
        scheduler = (diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler)()
        self.schedule = ext.noise_schedule(scheduler)
        if PLACE == "meta":  # where there is no autocast
            for parameter in self.network.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.denoiser, self.flow = ext.denoiser_from(self.network, scheduler), flow
        self.learnt = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, fused=PLACE == "cuda")
        self.network.train()
        rows, self.chance = part_of(n, 0.25)
        self.rows, self.work, self.calls = slice(rows), 0.0, 0
        self.with_graph = 4 if args.checkpointing else 3
        self.network.register_forward_hook(self.count)

    @staticmethod
    def conditions(family: str, n: int, side: int, dtype: torch.dtype) -> tuple[dict, tuple[int, ...]]:
        if family == "flux":
            tokens, ids = (side // 2) ** 2, torch.zeros(n, 512, 3)
            text = {"encoder_hidden_states": torch.randn(n, 512, 4096, dtype=dtype), "txt_ids": ids}
            pooled = {"pooled_projections": torch.randn(n, 768, dtype=dtype), "guidance": torch.full((n,), 3.5)}
            return text | pooled | {"img_ids": torch.zeros(n, tokens, 3)}, (tokens, 64)
        text = {"encoder_hidden_states": torch.randn(n, 77, 768 if family == "sd" else 2048, dtype=dtype)}
        added = {"text_embeds": torch.randn(n, 1280, dtype=dtype), "time_ids": torch.ones(n, 6, dtype=dtype)}
        return text | ({} if family == "sd" else {"added_cond_kwargs": added}), (4, side, side)

    def count(self, module: object, args: tuple, output: tuple) -> None:
        units = self.with_graph if torch.is_grad_enabled() else 1
        self.work, self.calls = self.work + units * len(output[0]) / len(self.x0), self.calls + units

    def part(self, tree: object) -> object:
        return {k: self.part(v) for k, v in tree.items()} if isinstance(tree, dict) else tree[self.rows]  # type: ignore

    def step(self, extra: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        with torch.autocast("cuda", torch.bfloat16) if PLACE == "cuda" else nullcontext():
            sigma = self.schedule.draw_sigmas(len(self.x0), device=self.x0.device)
            x = self.denoiser.process.perturb(self.x0, sigma)
            denoised = self.denoiser(x, sigma, **self.cond)
            weight = self.denoiser.output_weight(sigma)
            matching = ext.score_matching_loss(self.denoiser, x, self.x0, sigma, prediction=denoised, weight=weight)
            loss = matching.mean() + (0 if extra is None else extra(x, sigma, denoised))
        loss.backward()
        if PLACE == "cuda":
            self.optimizer.step()
        self.optimizer.zero_grad()

    def consistency(self) -> None:
        def extra(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
            r = self.rows
            options = {"denoised": denoised[r], **self.part(self.cond)}  # type: ignore
            return ext.consistency_loss(self.denoiser, x[r], sigma[r], ext.lower_sigma(sigma[r]), **options).mean()

        self.step(extra)

    def observation(self) -> None:
        def image(x: Tensor) -> Tensor:
            side = round((x[0].numel() // 4) ** 0.5)
            return x.reshape(len(x), 4, side, side)

        def judge(x: Tensor, *levels: Tensor) -> Tensor:
            return self.disc(image(x), *levels)

        def extra(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
            lower = look_ahead_sigma(sigma, 0.1, self.schedule.sigma_min, self.schedule.sigma_max)
            game = {"denoised": denoised, **self.cond}
            judged = ext.discriminator_loss(self.denoiser, judge, x, self.x0, sigma, lower, sigma_data=1.0, **game)
            judged.loss.mean().backward()
            return 0.01 * ext.observation_loss(self.denoiser, judge, x, sigma, lower, **game).mean()

        self.step(extra)


class FusedAttention(torch.autograd.Function):
    """Attention that keeps its arguments and its result for the backward pass, as on a GPU; without values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(kept) for kept in ctx.saved_tensors[:3])


def attention(query: Tensor, key: Tensor, value: Tensor, *args: object, **options: object) -> Tensor:
    return FusedAttention.apply(query, key, value)


def held(run: Callable[[], None]) -> int:
    """The bytes that the graph of a step holds, each tensor once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage()._cdata) if PLACE != "meta" else id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(t.numel() * t.element_size() for t in kept.values() if not isinstance(t, torch.nn.Parameter))


def unsynchronised(run: Callable[[], None]) -> None:
    """Run a step; any wait of the host for the device ends the benchmark."""
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    defaults = {"resolution": 512, "batch_size": 1, "rank": 16, "rounds": 5, "checkpointing": False}
    args, _ = flags(__doc__, choices={"family": ("sd", "sdxl", "flux")}, family=str, **defaults)
    if PLACE == "meta":
        torch.nn.functional.scaled_dot_product_attention = attention
    steps = Step(args)
    variants = {"plain": steps.step, "consistency": steps.consistency, "observation": steps.observation}
    counted, memory = {}, {}
    weights = sum(p.numel() * (4 if p.requires_grad else 2) for p in steps.network.parameters())
    trained = sum(p.numel() for p in steps.learnt)
    for name, run in variants.items():
        if PLACE == "cuda":
            run()
            torch.cuda.reset_peak_memory_stats()
        steps.work, steps.calls = 0.0, 0
        if PLACE == "cuda":
            run()
            memory[name] = torch.cuda.max_memory_allocated()
        else:
            memory[name] = weights + 12 * trained + held(run)
        counted[name] = steps.work / steps.with_graph, steps.calls / steps.with_graph
    print(f"{args.family}, {args.resolution} x {args.resolution}, batch {args.batch_size}, {machine()}, "
          f"{'LoRA of rank ' + str(args.rank) if args.rank else 'the whole network'}: {trained / 1e6:.1f}M trained, "
          f"{'with' if args.checkpointing else 'without'} gradient checkpointing")  # fmt: skip
    times = {}
    if PLACE == "cuda":
        times = in_turn({name: partial(unsynchronised, run) for name, run in variants.items()}, args.rounds)
    rows = [
        [name, *(f"{count:.2f}" for count in counted[name]), f"{memory[name] / 2**30:.2f} GiB",
         f"{memory[name] / memory['plain']:.2f}", ratio(times[name], times["plain"]) if times else "-"]
        for name in variants
    ]  # fmt: skip
    means = [f"{1 + steps.chance * (count - 1):.2f}" for count in counted["consistency"]]
    rows.insert(2, ["consistency, on average", *means, "", "", "-"])
    if times:
        mean = [p + steps.chance * (c - p) for p, c in zip(times["plain"], times["consistency"], strict=True)]
        rows[2][-1] = ratio(mean, times["plain"])
    print(table(["step", "work: plain", "calls: plain", "memory", ": plain", "time : plain"], rows))


if __name__ == "__main__":
    main()

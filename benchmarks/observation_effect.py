"""Does observation guidance help at few steps? A baseline, the baseline trained on, and those fine-tuned with it.

    python benchmarks/observation_effect.py --output_dir observation-digits --preset digits
    python benchmarks/observation_effect.py --output_dir observation-digits --preset digits --baseline my-digits
    python benchmarks/observation_effect.py --output_dir observation-mnist --preset mnist --dataset_name $MNIST \
        --max_train_steps 1000 --train_batch_size 64 --reference held_out

    baseline             train_consistency.py --consistency_weight 0, or the pipeline that `--baseline` names
    trained-on           the same, from the baseline, for the time of the tuned ones: `--tuning_steps` x `--time_ratio`
                         (of one step; training_cost.py measures it)
    PROJECTION-WEIGHT    train_observation.py from the baseline for as many steps, with each of `--projections` and of
                         `--weights` (gamma); the last pipeline (`--frechet_samples 0`), or with `--choose_best` the
                         best on the run's own held-out images

The learning rate of fine-tuning goes from `--tuning_learning_rate` to 0. `diffusers_ext.evaluation.evaluate` compares
them, with "trained-on" as the baseline: open evaluation/index.html in the output_dir. What is there is neither trained
nor drawn again.
"""

from functools import partial
from itertools import product
from pathlib import Path

from bench import flags
from trained import load, of_the_data, train

from diffusers_ext.commands import parse_arguments
from diffusers_ext.evaluation import EvaluationArguments, evaluate, load_real_images, markdown_table, write_report


def main() -> None:
    args, for_training = flags(
        __doc__, rest=True, choices={"projections": ("euler", "heun", "random"), "reference": ("held_out", "train")},
        output_dir=Path, baseline=None, tuning_steps=400, tuning_learning_rate=2e-4, tuning_lr_scheduler="cosine",
        time_ratio=1.6, projections=["euler", "random"], weights=["0.005", "0.025"], choose_best=False,
        nfe="5,10,20,50", schedulers="DDIM,DPMSolverMultistep,PNDM:skip_prk_steps=true,HeunDiscrete",
        num_samples=1000, reference="train", discriminator_learning_rate=1e-3,
    )  # fmt: skip
    out, plain = args.output_dir, ["--consistency_weight", "0"]
    asked = ["--schedulers", args.schedulers, "--nfe", args.nfe, "--num_samples", str(args.num_samples)]
    asked += ["--reference", args.reference, "--ode_images", "0", "--train_batch_size", "250"]
    measured = parse_arguments(EvaluationArguments, [*of_the_data(for_training), *asked])

    given = None if args.baseline is None else Path(args.baseline).resolve()
    baseline = given or train("train_consistency.py", out / "baseline", [*for_training, *plain])
    tuning = [*for_training, "--pretrained_model_name_or_path", str(baseline)]
    tuning += ["--lr_scheduler", args.tuning_lr_scheduler, "--learning_rate", str(args.tuning_learning_rate)]
    as_long = [*tuning, "--max_train_steps", str(round(args.tuning_steps * args.time_ratio)), *plain]
    models = {"trained-on": train("train_consistency.py", out / "trained-on", as_long), "baseline": baseline}
    tuning += ["--max_train_steps", str(args.tuning_steps)]
    tuning += ["--discriminator_learning_rate", str(args.discriminator_learning_rate)]
    tuning += [] if args.choose_best else ["--frechet_samples", "0"]
    for projection, weight in product(args.projections, args.weights):
        name, own = f"{projection}-{weight}", ["--projection", projection, "--observation_weight", weight]
        models[name] = train("train_observation.py", out / name, [*tuning, *own])

    pipelines = {name: load(folder).pipeline for name, folder in models.items()}
    evaluation = evaluate(pipelines, partial(load_real_images, measured), out / "evaluation", **measured.options())
    write_report(evaluation, out / "evaluation")
    print(f"{markdown_table(evaluation)}\nall of it, with pictures: {out / 'evaluation' / 'index.html'}")


if __name__ == "__main__":
    main()

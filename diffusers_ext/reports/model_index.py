"""Results in a model card's metadata (`model-index`), where the Hub reads and shows them.

    write_model_index(evaluation, "ours", folder / "README.md")                 # a card on this machine
    push_model_index(evaluation, "ours", "user/name", token=None, folder=out)   # the card of a repository

Every metric that we write carries `args.evaluator: diffusers_ext`. New results replace those that carry it and are of
the same task, data set and type of metric, so that the card holds one evaluation; whatever anybody else has written
stays. Of the card only `model-index` changes, the rest keeps its bytes (huggingface_hub's own `metadata_update` gives
results of one data set a common source, and leaves earlier results with other arguments standing).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from ..files import shown, write_file
from ..metrics import Interval
from .card import hub_name
from .front_matter import metadata_of, unreadable, with_metadata
from .measured import Evaluation

TASK = "unconditional-image-generation"
_EVALUATOR = "diffusers_ext"
_KEY = "model-index"


def model_index(evaluation: Evaluation, model: str) -> list[EvalResult]:
    """Return one result for every measure of every cell of one model, and its bits per dimension.

    The type is "fid" only where the evaluation says that it is; the name states scheduler, steps and extractor. What
    was not measured, or is not finite, has no result.

    Raises:
        ValueError: the evaluation has no such model.
    """
    if model not in evaluation.models:
        raise ValueError(f"there is no model {model!r} in the evaluation, only {', '.join(evaluation.models)}")
    results = []
    frechet = ("fid", "FID") if evaluation.is_fid else ("frechet_distance", "Frechet distance")
    for cell in evaluation.cells:
        if cell.model != model:
            continue
        quality, how = cell.quality, f"{cell.scheduler}, {cell.steps} steps"
        args = {"scheduler": cell.scheduler, "num_inference_steps": cell.steps, "nfe": cell.nfe}
        for kind, name, value in (
            (*frechet, quality.frechet),
            ("kernel_distance", "Kernel distance", quality.kernel),
            ("frechet_distance_pixels", "Frechet distance of pixels", quality.pixels),
            ("improved_precision", "Precision", quality.precision),
            ("improved_recall", "Recall", quality.recall),
            ("near_copies", "Share of near copies of training images", quality.copies),
        ):
            at = args | {"num_samples": cell.num_samples, "extractor": evaluation.extractor}
            results += _result(evaluation, kind, f"{name} ({how}; {evaluation.extractor})", value, how, at)
    likelihood = evaluation.likelihoods.get(model)
    if likelihood is not None:
        for method, what, bits in (
            ("ode", "probability flow", likelihood.ode),
            ("bound", "upper bound", likelihood.bound),
        ):
            name = f"Bits per dimension ({what})"
            results += _result(evaluation, "bits_per_dimension", name, bits, what, {"method": method})
    return results


def _result(
    evaluation: Evaluation, kind: str, name: str, value: Interval | float | None, config: str, args: dict[str, Any]
) -> list[EvalResult]:
    """Return a list of the result, which is empty for a value that is missing or not finite."""
    estimate = value.estimate if isinstance(value, Interval) else value
    if estimate is None or not math.isfinite(estimate):
        return []
    if isinstance(value, Interval) and math.isfinite(value.low) and math.isfinite(value.high):
        args = args | {"low": value.low, "high": value.high}
    data = shown(evaluation.data)
    return [
        EvalResult(
            task_type=TASK,
            task_name="Unconditional Image Generation",
            dataset_type=hub_name(evaluation.data) or re.sub(r"[^\w.-]+", "-", data.lower()).strip("-") or "images",
            dataset_name=data,
            dataset_args={"reference": evaluation.reference, "num_reference": evaluation.num_reference},
            metric_type=kind,
            metric_name=name,
            metric_value=estimate,
            metric_config=config,
            metric_args=args | {"seed": evaluation.seed, "evaluator": _EVALUATOR},
        )
    ]


def write_model_index(evaluation: Evaluation, model: str, card_path: str | os.PathLike) -> None:
    """Merge the results of a model into a card, `README.md`, which is made if there is none.

    Raises:
        ValueError: the evaluation has no such model, or the card's metadata cannot be read.
    """
    path = Path(card_path)
    with path.open(encoding="utf-8-sig", newline="") if path.exists() else open(os.devnull) as file:
        text = file.read()
    write_file(path, merged_card(text, evaluation, model))


def push_model_index(
    evaluation: Evaluation, model: str, repo_id: str, token: str | None, folder: str | os.PathLike
) -> None:
    """Merge the results of a model into the card of a repository on the Hub by one commit, or none if nothing changes.

    Args:
        token: `None` takes that of `hf auth login` or `HF_TOKEN`.
        folder: it holds the evaluation's `results.json`; the message of a failure names it.

    Raises:
        RuntimeError: it did not work. The message says why and how to push later, without the token.
    """
    try:
        api = HfApi(token=token)
        commit = api.model_info(repo_id).sha
        before = ""
        if "README.md" in api.list_repo_files(repo_id, revision=commit):
            with open(
                api.hf_hub_download(repo_id, "README.md", revision=commit), encoding="utf-8-sig", newline=""
            ) as file:
                before = file.read()
        after = merged_card(before, evaluation, model)
        if after != before:
            ModelCard(after).validate()
            api.upload_file(
                path_or_fileobj=after.encode(),
                path_in_repo="README.md",
                repo_id=repo_id,
                commit_message=f"Evaluation on {shown(evaluation.data)}",
                parent_commit=commit,
            )
    except Exception as error:  # the client has many types, and its messages may hold what it was given
        reason = _without_token(" ".join(f"{type(error).__name__}: {error}".split()), token)
    else:
        return
    raise RuntimeError(
        f"the results of {model!r} were not pushed to {repo_id} on the Hub: {reason}\n"
        f"They are safe in {folder}. To push them later, logged in (`hf auth login`):\n"
        f"    {_command(model, repo_id, folder)}"
    )


def _command(model: str, repo_id: str, folder: str | os.PathLike) -> str:
    code = (
        "from diffusers_ext.evaluation import push_model_index; "
        "from diffusers_ext.evaluation import Evaluation; "
        f"folder = {os.fspath(folder)!r}; "
        f"push_model_index(Evaluation.load(folder + '/results.json'), {model!r}, {repo_id!r}, None, folder)"
    )
    return shlex.join(["python", "-c", code])


def _without_token(text: str, token: str | None) -> str:
    for secret in (token, get_token()):
        text = text.replace(secret, "***") if secret else text
    return text


def merged_card(text: str, evaluation: Evaluation, model: str) -> str:
    """Return a card's text with the results of a model in its metadata; "" makes a card.

    Raises:
        ValueError: the evaluation has no such model, or the card's metadata cannot be read.
    """
    results, name = model_index(evaluation, model), shown(evaluation.models[model])
    text = text or f"# {name}\n"
    metadata = metadata_of(text)
    try:
        index = _merged(metadata.get(_KEY) or [], eval_results_to_model_index(name, results))
        if index:
            model_index_to_eval_results(index)  # the Hub's reader
    except (AttributeError, KeyError, TypeError) as error:
        raise unreadable(error) from error
    return text if index == (metadata.get(_KEY) or []) else with_metadata(text, {_KEY: index})


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of a `model-index` with our results at the end of the first one."""
    replaced = {_identity(result, metric) for result in new[0]["results"] for metric in result["metrics"]}
    kept = []
    for entry in old:
        results = []
        for result in entry["results"]:
            metrics = [
                metric
                for metric in result["metrics"]
                if not (_is_ours(metric) and _identity(result, metric) in replaced)
            ]
            if metrics:
                results.append(result | {"metrics": metrics})
        kept.append(entry | {"results": results})
    if not kept:
        return new if new[0]["results"] else []
    kept[0] = kept[0] | {"results": kept[0]["results"] + new[0]["results"]}
    return kept


def _is_ours(metric: dict[str, Any]) -> bool:
    args = metric.get("args")
    return isinstance(args, dict) and args.get("evaluator") == _EVALUATOR


def _identity(result: dict[str, Any], metric: dict[str, Any]) -> str:
    return json.dumps([result["task"]["type"], result["dataset"]["type"], metric["type"]])

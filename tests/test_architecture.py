"""The shape of the package: who imports whom, and what no file may hold."""

import ast
import sys
from pathlib import Path

import pytest
import stranger
from mutations import MUTATIONS, place_of

import diffusers_ext

PACKAGE = Path(diffusers_ext.__file__).parent
ORDER = [
    {"errors", "figures", "files", "presets", "progress", "randomness", "ranges", "shapes"},
    {"conditions", "fields", "hypercube", "stock"},
    {"process"},
    {"score"},
    {"noise_levels", "networks", "score_unet"},
    {"solvers"},
    {"interop", "weights"},
    {"losses", "discriminator", "extractors", "metrics", "likelihood", "calibration", "bridges"},
    {"mean_error", "diffusion_time"},
    {"schedulers"},
    {"pipelines"},
    {"checkpoints", "subjects"},
    {"conversion"},
    {"data"},
    {"reports"},
    {"evaluation"},
    {"training"},
    {"commands"},
]
LAYER = {name: i for i, names in enumerate(ORDER) for name in names}
TORCH_ONLY = ("shapes", "hypercube", "process", "score", "noise_levels", "solvers", "losses")


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path):
    """Layers of our own package that a file imports."""
    package = ["diffusers_ext", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = [*base, *(node.module.split(".") if node.module else [])]
            yield full[1] if len(full) > 1 else None


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_imports_a_later_layer(path):
    own = LAYER[layer_of(path)]
    for name in imported_layers(path):
        assert name in LAYER, f"{path.name} imports {name}, which has no place in ORDER"
        assert LAYER[name] < own or name == layer_of(path)


# What only a subject, or a pipeline of ours, may look up.
OF_A_PIPELINE = {"unet", "transformer", "vae", "vqvae", "encode_prompt", "null_class", "num_class_embeds"}
KINDS = {"UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "AutoencoderKL", "ClassConditionalPipeline"}
ROOT = PACKAGE.parent
ASKING = [
    *(p for p in MODULES if layer_of(p) in ("conversion", "data", "reports", "evaluation", "training", "commands")),
    *sorted((ROOT / "training").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


def questions(path):
    """Where a file asks what a pipeline is: its components by name, and its class or that of its network."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in OF_A_PIPELINE:
            answered = ast.unparse(node.value).startswith(("self", "subject", "calibration.config"))
            yield from () if answered else (f"line {node.lineno}: {ast.unparse(node)}",)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "isinstance"):
            words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            words |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            words |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if words & (KINDS | OF_A_PIPELINE):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", ASKING, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_a_subject_asks_what_a_pipeline_is(path):
    assert list(questions(path)) == []


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_mathematics_needs_torch_alone(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    outside = {
        module.split(".")[0]
        for node in ast.walk(tree)
        for module in ([a.name for a in node.names] if isinstance(node, ast.Import) else [])
        + ([node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
    }
    assert outside - set(sys.stdlib_module_names) == {"torch"}


def test_public_names_are_sorted_and_documented():
    names = diffusers_ext.__all__
    assert names == sorted(names)
    assert [n for n in names if not (getattr(diffusers_ext, n).__doc__ or "").strip()] == []


def test_importing_the_package_leaves_heavy_and_optional_libraries_alone():
    optional = (
        "datasets",
        "efficientnet_lite_pytorch",
        "matplotlib",
        "sklearn",
        "torch_fidelity",
        "torchmetrics",
        "zuko",
    )
    code = f"import sys, diffusers_ext; print([m for m in {optional} if m in sys.modules])"
    assert stranger.run(code).stdout.strip() == "[]"


def test_the_plan_is_that_of_the_order():
    import plan

    assert plan.PLAN.read_text() == plan.plan(), "draw it anew: python tests/plan.py"
    modules = {layer_of(path) for path in MODULES}
    assert modules == set(LAYER)
    assert all(f">{name}" in plan.PLAN.read_text() for name in modules)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_functions_and_classes_are_short(path):
    """No function has more than 60 lines, its docstring not counted, and no class more than 250."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                lines -= first.end_lineno - first.lineno + 1
            assert lines <= (250 if isinstance(node, ast.ClassDef) else 60), f"{node.name}: {lines} lines"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.part)
def test_each_mutation_still_has_its_place(mutation):
    """Otherwise `tests/mutations.py` ends before it has tried one."""
    assert (ROOT / place_of(mutation.snippet)).is_file()

"""What the package is from outside: names, signatures, imports, README."""

import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import jax.typing
import pytest

import adaptive_optax as ao
from adaptive_optax import study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

SIGNATURES = {
    "scale_by_rms": "decay=0.9, eps=1e-08, initial_scale=0.0, eps_in_sqrt=True, bias_correction=False, *, "
    "centered=False, granularity='coordinate', storage='float32'",
    "scale_by_adam": "b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, mu_dtype=None, *, eps_form='paper', "
    "nesterov=False, amsgrad=False, bias_correction=True, granularity='coordinate', mu_storage='float32', "
    "nu_storage='float32'",
    "scale_by_learning_rate": "learning_rate, *, flip_sign=True",
    "add_decoupled_weight_decay": "weight_decay, *, coupling='learning_rate', schedule=None, mask=None",
    "clip_by_global_norm": "max_norm",
    "global_norm": "tree",
    "adam_bound": "b1, b2, count=None, *, bias_correction=True",
    "adam": "learning_rate, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, mu_dtype=None, *, eps_form='paper', "
    "nesterov=False, amsgrad=False, bias_correction=True, granularity='coordinate', mu_storage='float32', "
    "nu_storage='float32'",
    "adamw": "learning_rate, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, mu_dtype=None, weight_decay=0.0001, "
    "mask=None, *, decay_coupling='learning_rate', decay_schedule=None, eps_form='paper', nesterov=False, "
    "amsgrad=False, bias_correction=True, granularity='coordinate', mu_storage='float32', "
    "nu_storage='float32'",
    "rmsprop": "learning_rate, decay=0.9, eps=1e-08, initial_scale=0.0, eps_in_sqrt=True, centered=False, "
    "momentum=None, nesterov=False, bias_correction=False, *, granularity='coordinate', storage='float32'",
    "global_rmsprop": "learning_rate, decay=0.9, eps=1e-08, initial_scale=0.0, eps_in_sqrt=True, "
    "centered=False, momentum=None, nesterov=False, bias_correction=False, *, storage='float32'",
    "scale_by_global_rms": "decay=0.9, eps=1e-08, initial_scale=0.0, eps_in_sqrt=True, "
    "bias_correction=False, *, centered=False, storage='float32'",
    "adgd": "max_learning_rate=None, *, initial_learning_rate=1e-06, rule='2020'",
    "error_controlled": "direction, max_learning_rate=None, *, tolerance=0.35, every=10, estimate='value', "
    "initial_learning_rate=1e-06, follow_schedule=True, controller=None",
    "get_error_control": "opt_state",
    "sgd": "learning_rate, momentum=None, nesterov=False, accumulator_dtype=None",
    "trace": "decay, nesterov=False, accumulator_dtype=None",
    "average_parameters": "power=8.0, *, decay=None",
    "averaged_parameters": "params, opt_state",
    "swap_averaged": "model_or_params, opt_state",
    "dense": "moment",
    "convert_storage": "opt_state, *, mu_storage=None, nu_storage=None",
    "exponential_decay": "init_value, transition_steps, decay_rate, transition_begin=0, staircase=False, "
    "end_value=None",
    "step_decay": "init_value, factor, every",
    "one_cycle": "peak_value, total_steps, *, preset='torch', pct_start=None, div_factor=None, "
    "final_div_factor=None, max_momentum=0.95, base_momentum=0.85, three_phase=False",
    "cyclical": "base_value, peak_value, half_cycle, mode='triangular', gamma=1.0",
    "warmup_stable_decay": "peak_value, total_steps, *, warmup_steps, decay_steps, shape='1-sqrt'",
    "warmup_cosine": "peak_value, total_steps, *, warmup_steps=0, init_value=0.0, end_value=0.0",
    "cosine_restarts": "peak_value, first_period, *, period_factor=1.0, warmup_steps=0, init_value=0.0, "
    "end_value=0.0, peak_factor=1.0",
    "inverse_sqrt": "peak_value, warmup_steps",
    "per_epoch": "schedule, steps_per_epoch, *, fractional=False",
    "replan": "schedule, *, at, total_steps, planned_steps=None, end_value=None, integral=None",
    "state_sharding": "tx, params",
    "global_coordinates": "specs",
    "grow_batch": "schedule, *, total_steps, max_factor, kind='sgd', b1=None, b2=None, eps=None",
    "telemetry": "inner, *, every=1, per='tree'",
    "get_telemetry": "opt_state",
    "reduce_on_plateau": "factor=0.1, patience=10, rtol=0.0001, atol=0.0, cooldown=0, accumulation_size=1, "
    "min_scale=0.0, *, mode='min', preset='optax'",
    "accumulate_gradients": "inner, every, *, drop_nonfinite=False, on_reject=None",
    "noise_scale": "opt_state",
    "partition_by_path": "transformations, default=None",
    "mask_by_path": "pattern",
    "describe_partition": "tx, params",
    "adam_mini": "learning_rate, params_layout=None, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, "
    "mu_dtype=None, weight_decay=0.0001, mask=None, *, decay_coupling='learning_rate', decay_schedule=None, "
    "mu_storage='float32', nu_storage='float32'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(ao, name)).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    assert str(bare) == f"({SIGNATURES[name]})"


def _public_functions():
    """The functions of the public API and the methods of its classes, each with a name to show."""
    for module in (ao, ao.study):
        for name, value in vars(module).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("adaptive_optax"):
                continue
            members = (
                {"": value} if inspect.isfunction(value) else vars(value) if inspect.isclass(value) else {}
            )
            for member, function in members.items():
                function = inspect.unwrap(getattr(function, "fget", getattr(function, "__func__", function)))
                if inspect.isfunction(function) and (not member.startswith("_") or member == "__init__"):
                    yield f"{name}.{member}", function


def test_public_signatures_mention_public_names_only():
    import adaptive_optax.study  # noqa: F401 (imported when it is used)

    public = vars(ao).keys() | vars(ao.study).keys() | vars(ao.typing).keys()
    private = set()
    for label, function in _public_functions():
        for annotation in function.__annotations__.values():
            for name in re.findall(
                r"(?<![\w.\"'])[A-Za-z_]\w*", annotation if isinstance(annotation, str) else ""
            ):
                value = function.__globals__.get(name)
                if value is None or inspect.ismodule(value) or isinstance(value, typing.TypeVar):
                    continue
                # An alias belongs to the module whose attribute it is, `typing.Any` to typing.
                home = sys.modules.get(getattr(value, "__module__", ""), ao)
                foreign = not home.__name__.startswith("adaptive_optax") and name in vars(home)
                if not foreign and name not in public and name not in vars(jax.typing):
                    private.add(f"{label}: {name}")
    assert not private


def test_granularities_are_static():
    def label(path, leaf):
        return path

    for make in (
        ao.Coordinate,
        lambda: ao.Axis(0, -1, reduce="sum"),
        ao.Tensor,
        lambda: ao.Labels(label),
        lambda: ao.Labels.by_path({"a": 1}, default=2),
        ao.Global,
        lambda: ao.ByPath({"a": "tensor"}),
        ao.AdamMiniBlocks,
        ao.Float32,
    ):
        assert make() == make() and hash(make()) == hash(make())
        with pytest.raises(AttributeError):
            make().reduce = "other"


def test_importing_it_imports_jax_optax_chex_and_numpy_only():
    code = (
        "import sys, jax, optax, chex, numpy; before = {m.split('.')[0] for m in sys.modules};"
        "import adaptive_optax; new = {m.split('.')[0] for m in sys.modules} - before;"
        "print(new - sys.stdlib_module_names)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "{'adaptive_optax'}"


def test_importing_it_leaves_the_choice_of_devices_to_the_user():
    code = (
        "import jax, adaptive_optax, adaptive_optax.study.tasks, adaptive_optax.integrations.flax;"
        "jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    )
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert ran.stdout.strip() == "3"


def test_the_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("adaptive-optax") == ao.__version__


def test_citation_and_changelog_name_this_version_and_its_date():
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (.*)$", citation, re.MULTILINE)
    (date,) = re.findall(r'^date-released: "(.*)"$', citation, re.MULTILINE)
    assert version == ao.__version__
    assert f"## [{version}] - {date}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_description_on_pypi_has_no_link_into_the_repository():
    description = importlib.metadata.metadata("adaptive-optax")["Description"]
    links = re.findall(r"\]\(([^)]+)\)", description) + re.findall(r'src(?:set)?="([^"]+)"', description)
    assert len(links) > 25 and all(link.startswith("https://") for link in links), links
    assert f"/v{ao.__version__}/docs/start.md" in description and "<!--" not in description


def test_optax_internals_are_not_imported():
    for path in (ROOT / "adaptive_optax").rglob("*.py"):
        assert not re.search(r"(?<!adaptive_)\boptax\._\w", path.read_text()), path


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_the_public_api_only(path):
    imported = re.findall(
        r"^(?:from|import) (adaptive_optax[\w.]*)(?: import (\w+))?", path.read_text(), re.M
    )
    assert imported
    names = ("", ".integrations.flax", ".integrations.orbax", ".study", ".study.tasks")
    public = {f"adaptive_optax{name}" for name in names}
    assert {module if name != "tasks" else f"{module}.tasks" for module, name in imported} <= public


def test_a_verdict_on_a_model_of_ones_own_takes_less_than_30_lines():
    for page, most in (("README.md", 15), ("docs/on_my_model.md", 30)):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        code = next(code for code in blocks if "study.compare(" in code)
        assert len(code.splitlines()) < most


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_the_study_has_what_is_promised():
    from adaptive_optax import study

    promised = {
        "Task": "init, loss, train, validation, *, batch_size, metric=None, name='task', "
        "has_model_state=False, evaluation_batch_size=None, maximize=False, batch_statistics=None",
        "nnx_task": "build, loss, train, validation, *, batch_size, metric=None, name='task', "
        "evaluation_batch_size=None, maximize=False",
        "EvaluatedArm": "build, evaluate",
        "judged_by": "evaluate",
        "suggest": "learning_rates, losses, rule",
        "load": "path",
    }
    for name, expected in promised.items():
        parameters = inspect.signature(getattr(study, name)).parameters.values()
        bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert str(bare) == f"({expected})"
    begins = {
        "compare": [
            "task",
            "arms",
            "learning_rates",
            "seeds",
            "steps",
            "tuning_seeds",
            "baseline",
            "margin",
            "out",
        ],
        "lr_range_test": ["task", "optimizer", "low", "high", "points", "steps", "seeds"],
        "judge": ["table", "baseline", "margin"],
    }
    for name, expected in begins.items():
        assert list(inspect.signature(getattr(study, name)).parameters)[: len(expected)] == expected


def test_files_named_in_the_readme_exist():
    named = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_packages_data_files_are_where_they_are_read():
    assert (ROOT / "adaptive_optax" / "py.typed").exists()
    for name in ("report.html", "parts.html", "report.css"):
        assert (ROOT / "adaptive_optax" / "study" / "report" / "templates" / name).exists()


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="adaptive-optax")
    assert callable(command.load())


def test_the_command_says_in_a_sentence_which_package_is_missing(tmp_path):
    code = (
        "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['adaptive-optax', '--help']; "
        "runpy.run_module('adaptive_optax', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("adaptive-optax: ") and "typer" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    helped = subprocess.run(
        [sys.executable, "-m", "adaptive_optax", "--help"], capture_output=True, text=True
    )
    assert helped.returncode == 0 and "compare" in helped.stdout


def test_the_contents_name_every_public_function():
    page = (ROOT / "docs" / "contents.md").read_text()
    named = set(re.findall(r"\w+", page))
    for module in (ao, study):
        functions = {
            name for name in dir(module) if inspect.isfunction(getattr(module, name)) and name[0] != "_"
        }
        assert len(functions) >= 8 and functions <= named, sorted(functions - named)


@pytest.mark.parametrize("page", ["docs/contents.md", "CHANGELOG.md", "docs/extending.md"])
def test_public_modules_named_in_the_papers_have_what_is_named(page):
    named = set(re.findall(r"integrations\.flax\.(\w+)", (ROOT / page).read_text()))
    module = importlib.import_module("adaptive_optax.integrations.flax")
    assert all(hasattr(module, name) for name in named), named
    assert named or page == "docs/extending.md"

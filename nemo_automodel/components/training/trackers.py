"""TensorBoard, Weights & Biases and MLflow, each behind the same two calls; imported only where a run asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from nemo_automodel.errors import MissingExtraError


class Tracker(Protocol):
    """Where metrics go besides ``metrics.jsonl``."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record named numbers of optimizer step ``step``."""
        ...

    def close(self) -> None:
        """Send what is still waiting."""
        ...


def require_extra(module: str, extra: str) -> None:
    """Check that ``module`` is installed, without importing it.

    Raises:
        MissingExtraError: It is not; the message is the command that installs it.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"loggers.{extra}: the package {module!r} is not installed; run: pip install 'nemo-automodel[{extra}]'"
        )


class TensorBoardTracker:
    """Event files for ``tensorboard --logdir``.

    Args:
        options: Arguments of ``torch.utils.tensorboard.SummaryWriter``; ``log_dir`` defaults to
            ``<run_dir>/tensorboard``.
        run_dir: The run's directory.
        config: The resolved recipe, kept as text beside the curves.
        first_step: Steps already done; what an aborted run logged after it is hidden.
    """

    def __init__(self, options: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any], first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = first_step + 1 if first_step else None
        arguments = {"log_dir": str(run_dir / "tensorboard"), "purge_step": purge_step} | dict(options)
        self._writer: Any = SummaryWriter(**arguments | {"log_dir": str(Path(arguments["log_dir"]).expanduser())})
        for name, value in flatten(config).items():
            self._writer.add_text(f"config/{name}", str(value), first_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See ``Tracker.log``."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See ``Tracker.close``."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run.

    Args:
        options: Arguments of ``wandb.init`` (project, name, entity, mode, ...).
        run_dir: The run's directory; W&B keeps its local files there.
        config: The resolved recipe, shown as the run's config.
        first_step: Unused: W&B orders by the logged ``step`` itself.
    """

    def __init__(self, options: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any], first_step: int):
        import wandb

        self._run: Any = wandb.init(**({"dir": str(run_dir), "config": dict(config)} | dict(options)))
        # An own x axis: W&B drops points whose step is not above the last one, which a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See ``Tracker.log``."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """See ``Tracker.close``."""
        self._run.finish()


class MLflowTracker:
    """An MLflow run.

    Args:
        options: ``tracking_uri``, ``experiment_name``; whatever else is given goes to ``mlflow.start_run``.
        run_dir: Unused: MLflow has a store of its own.
        config: The resolved recipe, logged as parameters.
        first_step: Unused: MLflow keeps every value of a repeated step.
    """

    def __init__(self, options: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any], first_step: int):
        import mlflow

        self._mlflow: Any = mlflow
        run_options = dict(options)
        if tracking_uri := run_options.pop("tracking_uri", None):
            mlflow.set_tracking_uri(tracking_uri)
        if experiment_name := run_options.pop("experiment_name", None):
            mlflow.set_experiment(experiment_name)
        mlflow.start_run(**run_options)
        longest = 500  # of a parameter's value, in MLflow's stores
        mlflow.log_params({name: str(value)[:longest] for name, value in flatten(config).items()})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See ``Tracker.log``."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        """See ``Tracker.close``."""
        self._mlflow.end_run()


TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoardTracker),
    "wandb": ("wandb", WandbTracker),
    "mlflow": ("mlflow", MLflowTracker),
}
"""Extra -> (module that must be there, tracker)."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

"""Which callables a YAML may name: trusted packages minus dangerous callables, and what the command line allowed.

Opting in with ``--allow-target`` is running that code. Nothing here resolves a name until it is checked: first from
source, before anything is imported, then again on the object itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_automodel.config.sources import Definition, Sources, Trail
from nemo_automodel.config.suggest import nearest
from nemo_automodel.errors import ConfigError

ENV_ALLOW = "AUTOMODEL_ALLOW_TARGET"
"""Environment variable with the same entries as ``--allow-target``, separated by commas."""

EXTRAS = ("peft", "torchao", "bitsandbytes", "liger_kernel", "wandb", "mlflow", "tensorboard")
TRUSTED_ROOTS = ("nemo_automodel", "torch", "torchdata", "transformers", "datasets", *EXTRAS)

DANGEROUS = (
    "nemo_automodel.cli", "nemo_automodel.config", "nemo_automodel.recipes",
    "torch.classes", "torch.compiler", "torch.cuda.jiterator", "torch.distributed.checkpoint", "torch.distributed.elastic", "torch.distributed.launch",
    "torch.distributed.launcher", "torch.distributed.rpc", "torch.distributed.run", "torch.export", "torch.fx",
    "torch.hub", "torch.jit", "torch.library", "torch.load", "torch.multiprocessing", "torch.onnx", "torch.ops",
    "torch.package", "torch.save", "torch.serialization", "torch.storage", "torch.testing",
    "torch.utils.benchmark", "torch.utils.bottleneck", "torch.utils.collect_env", "torch.utils.cpp_extension", "torch.utils.data.datapipes",
    "torch.utils.hipify", "torch.utils.model_dump", "torch.utils.model_zoo", "torch.utils.serialization", "torch.utils.show_pickle",
    "transformers.cli", "transformers.commands", "transformers.dynamic_module_utils", "transformers.testing_utils",
    "transformers.utils", "datasets.commands", "datasets.packaged_modules", "datasets.utils",
    "mlflow.cli", "mlflow.models", "mlflow.projects", "mlflow.pyfunc", "mlflow.run", "mlflow.server", "mlflow.utils",
    "wandb.agent", "wandb.cli", "wandb.docker", "wandb.sdk.launch", "wandb.util", "tensorboard.main", "tensorboard.program",
)  # fmt: skip
"""Inside trusted packages, but able to run programs, unpickle files, or fetch and run code."""

_DANGEROUS_NAMES = {
    "check_output", "eval", "exec", "exec_module", "getoutput", "import_module", "load_inline", "load_library",
    "load_module", "loads", "popen", "run_module", "run_path", "spawn", "system",
}  # fmt: skip

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")


class TargetPolicy:
    """Decides on ``_target_`` values and resolves them.

    Args:
        allow: Packages, dotted names or ``.py`` files that the user vouches for; those in the environment variable
            ``AUTOMODEL_ALLOW_TARGET`` are added.
        folder: Where the YAML is; files are named relative to it.
    """

    def __init__(self, allow: Sequence[str] = (), folder: str | Path = "."):
        entries = [*allow, *(e.strip() for e in os.environ.get(ENV_ALLOW, "").split(",") if e.strip())]
        self._folder = Path(folder)
        self._files = {
            f.resolve() for e in entries if e.endswith(".py") for f in (self._folder / e, Path(e)) if f.is_file()
        }
        self._names = [e for e in entries if not e.endswith(".py")]
        self.sources = Sources(extra_path=[str(Path.cwd()), str(self._folder.resolve())])
        for entry in entries:
            self._require_existing(entry)

    def find(self, target: str) -> Definition:
        """Where ``target`` is defined, read from source.

        Raises:
            ConfigError: ``problem; fix`` (the caller says where): not a name, not allowed, not there, not callable.
        """
        if match := _FILE.fullmatch(target):
            return self._find_in_file(target, match["file"], match["name"])
        if not _DOTTED.fullmatch(target):
            raise ConfigError("not a dotted name; write package.module.callable, or ./file.py:callable")
        self._require_allowed_name(target)
        trail = Trail()
        found = self.sources.resolve(target, trail)
        for module in trail.modules:
            if not self._is_trusted_path(module):
                raise ConfigError(f"leads out of the trusted packages, to {module}; {self._flag(target)}")
        if found is None:
            raise ConfigError(self._unresolved(target, trail))
        self._require_safe(found.path, target)
        self._require_callable(target, found)
        return found

    def load(self, target: str) -> Callable[..., Any]:
        """The callable itself, imported now and checked once more: a hop to somewhere else is refused here too."""
        match = _FILE.fullmatch(target)
        if match is not None:
            self._find_in_file(target, match["file"], match["name"])
            found: Any = functools.reduce(
                getattr, match["name"].split("."), self._import_file(self._file(match["file"]))
            )
        else:
            self._require_allowed_name(target)
            found = self._import_dotted(target)
            self._require_own(found, target)
        if not callable(found):
            raise ConfigError(f"is a {type(found).__name__}, not something to call; name a class or a function")
        return found

    def _find_in_file(self, target: str, name: str, attribute: str) -> Definition:
        file = self._file(name)
        if not file.is_file():
            raise ConfigError(f"no such file beside the YAML: {file}; check the name")
        if file not in self._files:
            raise ConfigError(f"runs a file of yours; if you trust it, add --allow-target {name}")
        module = _file_module(file)
        self.sources.add_file(module, file)
        trail = Trail()
        found = self.sources.resolve(f"{module}.{attribute}", trail)
        if found is None:
            hint = f"did you mean `{name}:{trail.nearest}`?" if trail.nearest else "name a class or function in it"
            raise ConfigError(f"{name} has no `{trail.missing}`; {hint}")
        self._require_callable(target, found)
        return found

    def _file(self, name: str) -> Path:
        return (self._folder / name).resolve()

    def _require_existing(self, entry: str) -> None:
        if entry.endswith(".py"):
            if not (self._folder / entry).is_file() and not Path(entry).is_file():
                raise ConfigError(f"command line --allow-target {entry}: no such file; name one relative to the YAML")
        elif self.sources.module(entry.partition(".")[0]) is None:
            raise ConfigError(
                f"command line --allow-target {entry}: no such package; install it, or run where it can be imported"
            )

    def _require_allowed_name(self, target: str) -> None:
        root = target.partition(".")[0]
        if self._is_allowed(target):
            return
        if root not in TRUSTED_ROOTS:
            close = nearest(root, TRUSTED_ROOTS, cutoff=0.75)
            meant = f"did you mean `{close}{target[len(root) :]}`? Otherwise, " if close else ""
            raise ConfigError(f"{root} is not a trusted package; {meant}{self._flag(root)}")
        if root != "nemo_automodel" and any(part.startswith("_") for part in target.split(".")):
            raise ConfigError(f"a private name of {root}; {self._flag(target)}")
        if "__" in target:
            raise ConfigError(f"a special name; {self._flag(target)}")
        self._require_safe(target, target)

    def _require_safe(self, path: str, target: str) -> None:
        if self._is_allowed(path) or self._is_allowed(target):
            return
        is_converter = path.startswith("transformers.") and ".convert_" in path  # scripts that unpickle checkpoints
        if (
            is_converter
            or any(_within(path, prefix) for prefix in DANGEROUS)
            or path.rpartition(".")[2] in _DANGEROUS_NAMES
        ):
            raise ConfigError(f"{path} can run or load arbitrary code; {self._flag(target)}")

    def _require_callable(self, target: str, found: Definition) -> None:
        if found.kind == "module":
            inside = nearest(target.rpartition(".")[2], self.sources.module(found.module).bindings) if self.sources.module(found.module) else None  # type: ignore[union-attr] # fmt: skip
            hint = f"did you mean `{target}.{inside}`?" if inside else "name a class or a function in it"
            raise ConfigError(f"is a module, not something to call; {hint}")
        if found.kind == "value":
            raise ConfigError("is a value, not something to call; name a class or a function")

    def _unresolved(self, target: str, trail: Trail) -> str:
        root = target.partition(".")[0]
        if trail.missing == root:
            if root in EXTRAS:
                return f"{root} is not installed; run `pip install {root.replace('_', '-')}`"
            return f"there is no package {root}; install it, or check the name"
        before = target[: target.rindex(trail.missing)]
        after = target[len(before) + len(trail.missing) :]
        hint = (
            f"did you mean `{before}{trail.nearest}{after}`?"
            if trail.nearest
            else f"look for its name in {before[:-1]}"
        )
        return f"{before[:-1]} has no `{trail.missing}`; {hint}"

    def _import_dotted(self, target: str) -> Any:
        root, *rest = target.split(".")
        if importlib.util.find_spec(root) is None:
            sys.path.extend(p for p in (str(Path.cwd()), str(self._folder.resolve())) if p not in sys.path)
        found: Any = importlib.import_module(root)
        walked = root
        for part in rest:
            walked = f"{walked}.{part}"
            if isinstance(found, ModuleType) and not hasattr(found, part):
                importlib.import_module(walked)
            found = getattr(found, part)
            if isinstance(found, ModuleType) and not self._is_trusted_path(found.__name__):
                raise ConfigError(f"leads out of the trusted packages, to {found.__name__}; {self._flag(target)}")
        return found

    def _import_file(self, file: Path) -> ModuleType:
        name = _file_module(file)
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]

    def _require_own(self, found: Any, target: str) -> None:
        """Check the object's own ``__module__.__qualname__``, and that of the class it is bound to."""
        while isinstance(found, functools.partial):
            found = found.func
        owner = getattr(found, "__self__", None)
        for part in (found, owner if isinstance(owner, type) else None):
            if part is None:
                continue
            module = getattr(part, "__module__", None) or type(part).__module__
            path = f"{module}.{getattr(part, '__qualname__', type(part).__qualname__)}"
            if not self._is_trusted_path(path) and not self._is_allowed(target):
                raise ConfigError(f"is really {path}, outside the trusted packages; {self._flag(target)}")
            self._require_safe(path, target)

    def _is_trusted_path(self, path: str) -> bool:
        return path.partition(".")[0] in TRUSTED_ROOTS or self._is_allowed(path)

    def _is_allowed(self, path: str) -> bool:
        return any(_within(path, name) for name in self._names)

    def _flag(self, name: str) -> str:
        return f"if you trust it, add --allow-target {name} (that runs its code)"


def _within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def _file_module(file: Path) -> str:
    """A module name for a single file, the same for every process."""
    return f"automodel_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"

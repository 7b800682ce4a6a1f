"""Finding the decoder blocks of any model by its structure: what is compiled, sharded and checkpointed one by one."""

from __future__ import annotations

from torch import nn

from nemo_automodel._transformers.compat import unsplittable_class_names


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of ``model``, in order: decoder blocks, and those of a vision or audio encoder beside them.

    They are the elements of the outermost ModuleLists whose classes the model declares unsplittable; a model that
    declares none gives its outermost ModuleLists with parameters, less those much smaller than the largest.
    """
    return [block for stack in _stacks(model) for block in stack]


def find_stacks(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The full names of ``find_blocks``, one tuple for each ModuleList that holds them."""
    names = {module: name for name, module in model.named_modules()}
    return tuple(tuple(dict.fromkeys(names[block] for block in stack)) for stack in _stacks(model))


def _stacks(model: nn.Module) -> list[list[nn.Module]]:
    lists = _outermost_lists(model)
    declared = unsplittable_class_names(model)
    named = [blocks for blocks in lists if any(_class_names(block) & declared for block in blocks)]
    if not named:
        sizes = [sum(p.numel() for block in blocks for p in block.parameters()) for blocks in lists]
        named = [blocks for blocks, size in zip(lists, sizes, strict=True) if size * 20 >= max(sizes)]
    return named


def _outermost_lists(module: nn.Module) -> list[list[nn.Module]]:
    found: list[list[nn.Module]] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            blocks = [block for block in child if next(block.parameters(), None) is not None]
            if blocks:
                found.append(blocks)
        else:
            found.extend(_outermost_lists(child))
    return found


def _class_names(block: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(block).__mro__}

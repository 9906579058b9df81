"""Forward hooks through which a step, or a single run, sees what happens inside a network.

Those of a step stay registered and idle: ``torch.compile`` traces hooks that are there
beforehand, but neither follows a registration nor notices one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Tape:
    """Where the hooks find the step to report to: none, outside a training call.

    The hooks know this object only. So a copy of the network alone copies idle hooks,
    and a copy of the whole ``IMCL`` has hooks that report to the copy. And when gradient
    checkpointing runs a part of the network again, in the backward pass, the step is over
    and the hooks do nothing.
    """

    def __init__(self) -> None:
        self.step: Step | None = None

    def __reduce__(self) -> tuple[type[Tape], tuple[()]]:
        return Tape, ()  # the step under way is not a copy's


def refuse_replica(module: nn.Module, name: str) -> None:
    """Raises a RuntimeError in a replica of nn.DataParallel, whose hooks are the original's."""
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"{name} can't be trained under nn.DataParallel, whose replicas share its hooks; use "
            "nn.parallel.DistributedDataParallel"
        )


class Tap:
    """A forward hook, with kwargs, that hands a tensor of its module to the step under way.

    Args:
        tape: where to look for the step.
        layer: index of the layer whose output (of a tuple the first) to hand over, or None
            for the classifier, of which it is the input.
        channels_last: the output is (B, *positions, C), and a view (B, C, *positions) is
            handed over.
    """

    def __init__(self, tape: Tape, layer: int | None, channels_last: bool = False) -> None:
        self.tape = tape
        self.layer = layer
        self.channels_last = channels_last

    def __call__(self, module: nn.Module, args: tuple, *rest: Any) -> Any:
        step = self.tape.step
        if step is None:
            return None
        # torch.ao.quantization hands hooks on to what it puts in a module's place, and forgets that
        # they take keyword arguments.
        *given, output = rest
        if self.layer is None:
            values = (*args, *(value for kwargs in given for value in kwargs.values()))
            step.report(None, module, values[0])
            return step.instead_of(output)
        features = output if isinstance(output, Tensor) else output[0]
        step.report(self.layer, module, features.movedim(-1, 1) if self.channels_last else features)
        return None


class Step:
    """A training call that collects what taps report; a subclass says what becomes of it.

    That is done at once, when the features are in cache, unless the module runs in a
    segment under gradient checkpointing. What autograd saves in there is thrown away and
    expected again of the second run, in which the taps are idle; so it waits for ``finish``.
    """

    def __init__(self) -> None:
        self.ran: list[int | None] = []  # layers, and the classifier, in the order they ran
        self.outputs: list[Any] = []  # of the whole network
        self.keywords: Mapping[str, Any] = {}  # arguments of the network
        self.weights: dict[str, Tensor] = {}  # see kernel_weights
        self.waiting: list[_Waiting] = []
        self.without_gradient: list[int] = []  # layers that ran under the network's own no_grad
        self.over = False  # the network has run, and taps hand over no more
        self.context = _autograd_context()

    def take(self, layer: int | None, module: nn.Module, features: Tensor) -> None:
        """What to do with the features of a layer, or of the classifier (None)."""
        raise NotImplementedError

    def begins(self) -> None:
        """What to do when the network is about to run."""

    def instead_of(self, output: Any) -> Any:
        """What the classifier is to return in place of its output; None: that."""
        return None

    def report(self, layer: int | None, module: nn.Module, features: Tensor) -> None:
        self.ran.append(layer)
        if _autograd_context() == self.context:
            self.take(layer, module, features)
        else:
            # A network that is compiled by itself can't be asked, and has no such function.
            inside = not torch.compiler.is_compiling() and _inside_function()
            self.waiting.append(_Waiting(layer, module, features, inside, _autocast(features)))

    def finish(self) -> None:
        """Do, outside all checkpointed segments, what had to wait.

        Features without gradient, of frozen layers or under the network's own ``no_grad``,
        contribute their value.

        Raises:
            RuntimeError: features have lost their gradient, as they do inside a segment
                under reentrant checkpointing, whose end has one.
        """
        self.over = True
        for layer, module, features, inside_function, autocast in self.waiting:
            if inside_function and torch.is_grad_enabled() and not features.requires_grad:
                raise RuntimeError(
                    f"model: the output of a {type(module).__name__} that takes part in "
                    "collaborative learning is computed inside an autograd function, where "
                    "it has no gradient, so nothing can be learnt from it; for gradient "
                    "checkpointing pass use_reentrant=False to torch.utils.checkpoint, or "
                    "name as layers modules outside"
                )
            if layer is not None and torch.is_grad_enabled() and not features.requires_grad:
                self.without_gradient.append(layer)
            if features.is_inference() and torch.is_grad_enabled():
                features = features.clone()  # which autograd may keep
            with autocast:
                self.take(layer, module, features)
        self.waiting.clear()


class _Waiting(NamedTuple):
    """What is to be done when the network has run, and under which autocast it would have been."""

    layer: int | None
    module: nn.Module
    features: Tensor
    inside_function: bool
    autocast: contextlib.AbstractContextManager


def _autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The autocast that is on now, of a Tensor's device: it may end before the network does."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    enabled = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)


# Where wrappers that return what they wrap returns have that.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def is_around(module: nn.Module, handle: RemovableHandle) -> bool:
    """Whether a module has what a hook is on inside it, and isn't merely a wrapper of that."""
    if handle.id in module._forward_hooks or any(name in module._modules for name in _WRAPPED):
        return False
    return any(handle.id in inner._forward_hooks for inner in module.modules())


def living(handles: Sequence[RemovableHandle]) -> list[RemovableHandle]:
    """Those whose modules are still there: others can be saved, but not loaded."""
    return [handle for handle in handles if handle.hooks_dict_ref() is not None]


def left_out(
    expected: Sequence[int | None], ran: Sequence[int | None], handles: Sequence[RemovableHandle]
) -> list[int]:
    """The layers that a call has left out; none, if what it did can't be told by that: one ran
    twice, or the classifier didn't, or hooks are gone.

    Args:
        expected: the layers, and the classifier, of the hooks, each once.
    """
    absent = [layer for layer in expected if layer is not None and layer not in ran]
    once = len(absent) + len(ran) == len(expected) and len(set(ran)) == len(ran)
    hooked = len(handles) == len(expected) and (
        torch.compiler.is_compiling() or all(map(_registered, handles))
    )
    return absent if once and hooked else []


def _registered(handle: RemovableHandle) -> bool:
    return handle.id in (handle.hooks_dict_ref() or {})


def _autograd_context() -> object:
    """What distinguishes the inside of a checkpointed segment: its hooks, or ``no_grad``."""
    if torch.compiler.is_compiling():
        return None
    return torch.is_grad_enabled(), _saved_tensors_hooks(False)


_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _inside_function() -> bool:
    """Whether this runs in an autograd Function's forward, as reentrant checkpointing does.

    There forward-mode gradients are off too, which ``no_grad`` leaves on.
    """
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


@contextlib.contextmanager
def observed(
    model: nn.Module,
    record: Callable[[tuple[str, int], nn.Module, tuple, Any], None],
    enter: Callable[[str], None] = lambda path: None,
) -> Iterator[None]:
    """Meanwhile ``enter(path)`` is called before each call of a module in ``model``, and
    ``record((path, how often it had run), module, inputs, output)`` after it; inputs are those by
    position, then those by name."""
    counts: Counter[str] = Counter()

    def ended(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        counts[path] += 1
        record((path, counts[path] - 1), module, (*args, *kwargs.values()), output)

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                for hook in (
                    module.register_forward_pre_hook(lambda *_, path=path: enter(path)),
                    module.register_forward_hook(partial(ended, path), with_kwargs=True),
                ):
                    hooks.enter_context(hook)
        yield

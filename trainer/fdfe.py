"""Fast dense feature extraction: any patch network as an exactly equal dense one, at any stride, in two forms.

Bailer et al., "Fast Dense Feature Extraction with CNNs that have Pooling or Striding Layers", BMVC 2017
(arXiv 1805.03096).  Owns the reading of a patch network into steps, the rewrite, and the refusal of what cannot be
rewritten.  Leaves padding to the exported graph (nothing here pads what is kept, nothing shifts) and the layer
tables to ``patch_nets``.

A patch network answers once for a p x p patch.  Its layers are numbered by ``c``, the product of the strides before
them: an output of the layer reads inputs that lie ``c`` px apart.  Asked for answers every ``stride`` px, a layer's
input must be known on a grid of ``t`` px, t = gcd(c, stride), which gives the two forms:

* ``dilated``: the kernel skips from grid point to grid point, dilation c / t, and the layer strides to the next grid.
* ``multipool`` (the paper's): strides that the answer does not need are split into phases, one shifted copy of the map
  for each, stacked on the batch; every layer then runs undilated.  One reshape and transpose put the phases back.

Both use the given network's own parameters: what is learned in one form is learned in all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edge.errors import TrainingError

Form = Literal["multipool", "dilated"]
Pair = tuple[int, int]

_POINTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Softmax2d,
)  # fmt: skip
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)
_GLOBAL_POOL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# Functions without parameters of their own; calls with more than the tensor are written as modules instead.
_FUNCTIONS: dict[Callable[..., Tensor], nn.Module] = {
    torch.relu: nn.ReLU(), F.relu: nn.ReLU(), F.relu6: nn.ReLU6(), torch.sigmoid: nn.Sigmoid(),
    torch.tanh: nn.Tanh(), F.leaky_relu: nn.LeakyReLU(), F.elu: nn.ELU(), F.gelu: nn.GELU(), F.silu: nn.SiLU(),
}  # fmt: skip
_METHODS = {"relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh()}


class CannotDensify(TrainingError):
    """A layer has no exact dense form; the message names it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One layer of the patch network: what it computes, over which window, (rows, columns).

    ``run`` maps (N, c, H, W) to (N, k, ...), given stride and dilation; a pointwise layer has a window of one and is
    called without either.
    """

    name: str
    run: Callable[..., Tensor]
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pointwise: bool = False

    def out(self, side: Pair) -> Pair:
        """The output's sides for an input of ``side``."""
        rows, columns = (
            (n - (k - 1) * d - 1) // s + 1 if n > (k - 1) * d else 0
            for n, k, d, s in zip(side, self.kernel, self.dilation, self.stride, strict=True)
        )
        return rows, columns

    def needs(self, side: Pair, stride: Pair) -> Pair:
        """The input's sides for an output of ``side``."""
        rows, columns = (
            (n - 1) * s + (k - 1) * d + 1 for n, k, d, s in zip(side, self.kernel, self.dilation, stride, strict=True)
        )
        return rows, columns


class DenseNet(nn.Module):
    """What ``densify`` gives; ``net`` is the patch network, whose parameters this one uses and does not copy.

    Maps (N, C, H, W) float to (N, k, (H - patch) // stride + 1, (W - patch) // stride + 1).

    Raises:
        TrainingError: the image is smaller than the patch.
    """

    def __init__(self, net: nn.Module, steps: tuple[_Step, ...], patch: int, stride: int, form: Form) -> None:
        super().__init__()
        self.net, self.patch, self.stride, self.form = net, patch, stride, form
        self._steps, self._every = _dilated(steps, stride) if form == "dilated" else (steps, (1, 1))

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseNet:
        # The steps hold the network's layers: a plain copy would go on using the original's weights.
        return densify(copy.deepcopy(self.net, memo), self.patch, self.stride, self.form)

    def forward(self, image: Tensor) -> Tensor:
        height, width = int(image.shape[2]), int(image.shape[3])
        if min(height, width) < self.patch:
            raise TrainingError(
                f"an image of {width} x {height} px is smaller than the network's patch of {self.patch} px; "
                "give larger images, or a network with a smaller patch"
            )
        rows, columns = ((side - self.patch) // self.stride + 1 for side in (height, width))
        if self.form == "multipool":
            return _multipool(image, self._steps, self.stride, (rows, columns))
        for step in self._steps:
            image = step.run(image) if step.pointwise else step.run(image, step.stride, step.dilation)
        # The footprint may be smaller than the patch (pooling floors): then there are a few positions more.
        return image[:, :, :: self._every[0], :: self._every[1]][:, :, :rows, :columns]


def densify(net: nn.Module, patch: int, stride: int = 1, form: Form = "multipool") -> DenseNet:
    """The dense form of ``net``, which answers (N, k, 1, 1) or (N, k) for a patch (N, C, patch, patch).

    Element (i, j) of the answer equals ``net`` on the patch whose corner pixel is (i * stride, j * stride), for any
    ``stride`` of at least 1 and any image of at least ``patch`` px a side.

    Raises:
        CannotDensify: a layer cannot be rewritten exactly; it is named, with what to write instead.
        TrainingError: ``stride`` or ``form`` makes no sense.
    """
    if stride < 1:
        raise TrainingError(f"the dense stride must be at least 1 px, got {stride}")
    if form not in get_args(Form):
        raise TrainingError(f"unknown dense form {form!r}; choose one of {', '.join(get_args(Form))}")
    return DenseNet(net, _read(net, patch), patch, stride, form)


# --- the patch network as a chain of steps ---------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Looks into containers and into modules with a forward of their own; torch's layers stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def _read(net: nn.Module, patch: int) -> tuple[_Step, ...]:
    """The chain of layers, each checked on the size that it sees when the network looks at one patch."""
    try:
        graph = _Tracer().trace(net)
    except (fx.proxy.TraceError, TypeError) as error:
        raise CannotDensify(f"{type(net).__name__} is no plain chain of layers: {error}") from error
    side: Pair = (patch, patch)
    steps: list[_Step] = []
    flat = False
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if last is not None:
                raise CannotDensify(f"{type(net).__name__} takes more than one input; a patch network takes the image")
            last = node
            continue
        if node.all_input_nodes != [last]:
            raise CannotDensify(
                f"{node.name}: it reads {', '.join(map(str, node.all_input_nodes)) or 'nothing'}, expected the layer "
                "before it alone; branches and sums have no dense form here"
            )
        if node.op == "output":
            break
        last = node
        name, module = _layer(net, node)
        if module is None:  # flatten
            flat = True
            continue
        step = _linear(name, module, side) if isinstance(module, nn.Linear) else _step(name, module, side)
        if not step.pointwise and flat != isinstance(module, nn.Linear):
            where = "comes after a flatten, where only Linear may" if flat else "comes without a flatten before it"
            raise CannotDensify(f"{name} ({type(module).__name__}): {where}; it has no dense form")
        side = step.out(side)
        if min(side) < 1:
            raise CannotDensify(f"{name}: nothing is left of a {patch} px patch here; the patch is larger than that")
        steps.append(step)
    if side != (1, 1):
        raise CannotDensify(
            f"{type(net).__name__} gives {side[0]} x {side[1]} values for a patch of {patch} px, expected 1 x 1; "
            "give the patch size that it was made for"
        )
    return tuple(steps)


def _layer(net: nn.Module, node: fx.Node) -> tuple[str, nn.Module | None]:
    """Name and module of a traced node; None for a flatten."""
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        if isinstance(module, nn.Flatten):
            if module.start_dim != 1 or module.end_dim != -1:
                raise CannotDensify(f"{node.target} (Flatten): expected all but the batch axis to be flattened")
            return str(node.target), None
        return str(node.target), module
    plain = len(node.args) == 1 and not {k: v for k, v in node.kwargs.items() if (k, v) != ("inplace", False)}
    if node.op == "call_function":
        if node.target is torch.flatten and node.args[1:] == (1,):
            return node.name, None
        if plain and node.target in _FUNCTIONS:
            return node.name, _FUNCTIONS[node.target]
    if node.op == "call_method":
        if node.target == "flatten" and node.args[1:] == (1,):
            return node.name, None
        if plain and node.target in _METHODS:
            return node.name, _METHODS[str(node.target)]
    raise CannotDensify(
        f"{node.name} ({node.op} {node.target}): no dense form; write it as one of torch's layers in the network"
    )


def _step(name: str, module: nn.Module, side: Pair) -> _Step:
    """The step of one of torch's layers, given the side of what it sees of a patch."""
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        if module.padding not in ("valid", 0, (0, 0)):
            raise CannotDensify(
                f"{name} ({kind}): pads by {module.padding} inside the network, where a dense run has real pixels; "
                "use padding 0 and pad the image before the network"
            )
        return _Step(name, _conv(module), _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation))
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        return _pool(name, module, side)
    if isinstance(module, _GLOBAL_POOL):
        raise CannotDensify(
            f"{name} ({kind}): global pooling depends on the size of what it sees; write a pooling of {side[0]} x "
            f"{side[1]}, which is what it sees of a patch"
        )
    if isinstance(module, _BATCH_NORM):
        if module.training or module.running_mean is None:
            raise CannotDensify(f"{name} ({kind}): statistics of the batch at hand; call .eval() on a trained network")
        return _Step(name, _batch_norm(module), pointwise=True)
    if isinstance(module, _DROPOUT):
        if module.training:
            raise CannotDensify(f"{name} ({kind}): drops at random in training mode; call .eval() on the network")
        return _Step(name, nn.Identity(), pointwise=True)
    if isinstance(module, _POINTWISE):
        return _Step(name, module, pointwise=True)
    raise CannotDensify(
        f"{name} ({kind}): no exact dense form is known; use convolutions, poolings, pointwise layers, BatchNorm "
        "(eval) and Linear after a flatten"
    )


def _pool(name: str, module: nn.MaxPool2d | nn.AvgPool2d, side: Pair) -> _Step:
    kind = type(module).__name__
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    if _pair(module.padding) != (0, 0):
        raise CannotDensify(f"{name} ({kind}): pads inside the network; use padding 0 and pad the image before it")
    if isinstance(module, nn.MaxPool2d):
        if module.return_indices:
            raise CannotDensify(f"{name} ({kind}): returns indices; use return_indices=False")
        step = _Step(name, _max_pool(kernel), kernel, stride, _pair(module.dilation))
    else:
        step = _Step(name, _avg_pool(kernel, module.divisor_override), kernel, stride)
    if module.ceil_mode and any(
        (n - (k - 1) * d - 1) % s for n, k, d, s in zip(side, kernel, step.dilation, stride, strict=True)
    ):
        raise CannotDensify(
            f"{name} ({kind}): ceil mode reaches beyond the {side[0]} x {side[1]} values that it sees of a patch; "
            "use ceil_mode=False"
        )
    return step


def _linear(name: str, module: nn.Linear, side: Pair) -> _Step:
    """A Linear over (channels, rows, columns) of one patch is a convolution with a kernel of rows x columns."""
    if module.in_features % (side[0] * side[1]):
        raise CannotDensify(
            f"{name} (Linear): takes {module.in_features} values, which is no whole number of channels of the "
            f"{side[0]} x {side[1]} values that are left of a patch"
        )
    shape = (module.out_features, -1, *side)

    def run(x: Tensor, stride: Pair, dilation: Pair) -> Tensor:
        return F.conv2d(x, module.weight.view(shape), module.bias, stride, 0, dilation)

    return _Step(name, run, side)


# --- what the steps compute ------------------------------------------------------------------------------------------


def _conv(module: nn.Conv2d) -> Callable[..., Tensor]:
    def run(x: Tensor, stride: Pair, dilation: Pair) -> Tensor:
        return F.conv2d(x, module.weight, module.bias, stride, 0, dilation, module.groups)

    return run


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:  # functional: a BatchNorm1d after Linear takes maps too
        return F.batch_norm(
            x, module.running_mean, module.running_var, module.weight, module.bias, training=False, eps=module.eps
        )

    return run


def _max_pool(kernel: Pair) -> Callable[..., Tensor]:
    def run(x: Tensor, stride: Pair, dilation: Pair) -> Tensor:
        if dilation == (1, 1):
            return F.max_pool2d(x, kernel, stride)
        # TensorRT's parser refuses a dilated MaxPool; shifted slices and Max say the same, one axis after the other.
        for axis in (0, 1):
            windows = _windows(x, axis, kernel[axis], stride[axis], dilation[axis])
            x = windows[0]
            for other in windows[1:]:
                x = torch.maximum(x, other)
        return x

    return run


def _avg_pool(kernel: Pair, divisor: int | None) -> Callable[..., Tensor]:
    area = kernel[0] * kernel[1] if divisor is None else divisor

    def run(x: Tensor, stride: Pair, dilation: Pair) -> Tensor:
        if dilation == (1, 1):
            return F.avg_pool2d(x, kernel, stride, divisor_override=divisor)
        for axis in (0, 1):
            windows = _windows(x, axis, kernel[axis], stride[axis], dilation[axis])
            x = windows[0]
            for other in windows[1:]:
                x = x + other
        return x / area

    return run


def _windows(x: Tensor, axis: int, kernel: int, stride: int, dilation: int) -> list[Tensor]:
    """For each tap of a kernel along rows (0) or columns (1): the inputs that it meets, one for each output."""
    count = (x.shape[2 + axis] - (kernel - 1) * dilation - 1) // stride + 1
    spans = [slice(tap * dilation, tap * dilation + (count - 1) * stride + 1, stride) for tap in range(kernel)]
    return [x[:, :, span] if axis == 0 else x[:, :, :, span] for span in spans]


# --- the two forms ---------------------------------------------------------------------------------------------------


def _dilated(steps: tuple[_Step, ...], stride: int) -> tuple[tuple[_Step, ...], Pair]:
    """Every step on the coarsest grid from which all answers ``stride`` px apart can still be had, and what is left.

    A grid serves if all that later windows read lies on it; behind the last window only the answers do.  What is left
    is how many values of the last map lie between answers, rows and columns: 1 unless nothing has a window.
    """
    found = []
    for axis in (0, 1):
        nominal = [math.prod(step.stride[axis] for step in steps[:place]) for place in range(len(steps))]
        grids = [1]  # px between neighbors of what goes into each step, and out of the last
        for place, step in enumerate(steps, 1):
            later = [nominal[n] for n in range(place, len(steps)) if steps[n].kernel[axis] > 1]
            grids.append(grids[-1] if step.pointwise else math.gcd(stride, *later))
        found.append((nominal, grids))
    rewritten = []
    for place, step in enumerate(steps):
        strides = tuple(grids[place + 1] // grids[place] for _, grids in found)
        dilations = tuple(
            step.dilation[axis] * nominal[place] // grids[place] if step.kernel[axis] > 1 else 1
            for axis, (nominal, grids) in enumerate(found)
        )
        rewritten.append(replace(step, stride=_pair(strides), dilation=_pair(dilations)))
    return tuple(rewritten), (stride // found[0][1][-1], stride // found[1][1][-1])


def _multipool(image: Tensor, steps: tuple[_Step, ...], stride: int, answers: Pair) -> Tensor:
    """The paper's form; ``answers`` is how many there are along rows and columns."""
    split = [_phases(steps, stride, axis) for axis in (0, 1)]
    period = [math.prod(step.stride[axis] for step in steps) for axis in (0, 1)]
    phases = [math.prod(count for count, _ in split[axis]) for axis in (0, 1)]
    grid = [period[axis] // phases[axis] for axis in (0, 1)]
    # Length of the last maps: enough for the last answer, whichever phase it is in.
    side: Pair = tuple((answers[axis] - 1) * stride // period[axis] + 1 for axis in (0, 1))  # type: ignore[assignment]
    sides = [side]
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        rows, columns = step.needs(sides[0], step.stride)
        shifts = [(split[axis][place][0] - 1) * split[axis][place][1] for axis in (0, 1)]
        sides.insert(0, (rows + shifts[0], columns + shifts[1]))
    # Zeros where a phase's last value lies beyond the image: they reach no answer that is kept.
    missing = [max(0, sides[0][0] - int(image.shape[2])), max(0, sides[0][1] - int(image.shape[3]))]
    x = F.pad(image, (0, missing[1], 0, missing[0])) if any(missing) else image
    for place, step in enumerate(steps):
        rows, columns = step.needs(sides[place + 1], step.stride)
        (down, down_by), (across, across_by) = split[0][place], split[1][place]
        shifted = [
            x[:, :, y * down_by : y * down_by + rows, z * across_by : z * across_by + columns]
            for y in range(down)
            for z in range(across)
        ]
        x = torch.cat(shifted) if len(shifted) > 1 else shifted[0]
        x = step.run(x) if step.pointwise else step.run(x, step.stride, step.dilation)
    counts = [(split[0][place][0], split[1][place][0]) for place in range(len(steps))]
    x = _unwarp(x, [pair for pair in counts if pair != (1, 1)][::-1])
    every = [stride // grid[axis] for axis in (0, 1)]
    return x[:, :, : (answers[0] - 1) * every[0] + 1 : every[0], : (answers[1] - 1) * every[1] + 1 : every[1]]


def _phases(steps: tuple[_Step, ...], stride: int, axis: int) -> list[Pair]:
    """For each step how many shifted copies it runs on, and how far apart they are in its input.

    A stride is kept as long as all before it were kept and ``stride`` is a multiple of their product; what is not
    kept becomes phases.
    """
    found, kept, whole = [], 1, True
    for step in steps:
        keep = math.gcd(step.stride[axis], stride // kept if stride % kept == 0 else 1) if whole else 1
        kept *= keep
        whole = whole and keep == step.stride[axis]
        found.append((step.stride[axis] // keep, keep))
    return found


def _unwarp(x: Tensor, counts: list[Pair]) -> Tensor:
    """Phases (M N, k, y, x), the last splitting outermost, back to where they belong: (N, k, y M_y, x M_x)."""
    # Two splittings at a time: TensorRT takes tensors of at most eight axes, and p = 65 has three.
    for place in range(0, len(counts), 2):
        x = _unwarp_once(x, counts[place : place + 2])
    return x


def _unwarp_once(x: Tensor, counts: list[Pair]) -> Tensor:
    channels, rows, columns = x.shape[1:]
    sizes = [count for pair in counts for count in pair]  # last splitting first: down, across, down, across, ...
    n = len(sizes)
    x = x.reshape(*sizes, -1, channels, rows, columns)
    down, across = range(0, n, 2), range(1, n, 2)
    x = x.permute(n, n + 1, n + 2, *down, n + 3, *across)
    high = int(rows) * math.prod(sizes[place] for place in down)
    wide = int(columns) * math.prod(sizes[place] for place in across)
    return x.reshape(-1, channels, high, wide)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])

"""Steps that move elements: their values stay, so that one that is exact stays exact."""

from __future__ import annotations

import numpy as np

from tests.fuzz.program import Dim, Length, Value, element_type
from tests.fuzz.sketch import FLOATS, Sketch, exact

ANY = (*FLOATS, "int64", "int32", "bool")
HUGE = 2**62


def static_axes(x: Value, least: int = 1) -> list[int]:
    """The axes whose length is known, and at least so much."""
    return [i for i, d in enumerate(x.shape) if isinstance(d, int) and d >= least]


def with_dim(x: Value, axis: int, dim: Dim) -> tuple[Dim, ...]:
    return (*x.shape[:axis], dim, *x.shape[axis + 1 :])


def any_axis(s: Sketch, x: Value, axis: int) -> int:
    """The axis, or the same counted from the end."""
    return axis - len(x.shape) if s.chance(40) else axis


def reshape(s: Sketch) -> None:
    """Merges two dimensions or splits one."""
    x = s.pick(ANY, 1)
    known = [i for i, d in enumerate(x.shape) if isinstance(d, int) and d % 2 == 0]
    if known and s.chance(50):
        i = s.choice(known)
        d = x.shape[i]
        assert isinstance(d, int)
        parts: list[Dim] = [2, d // 2] if s.chance(50) else [d // 2, 2]
        shape = (*x.shape[:i], *parts, *x.shape[i + 1 :])
    elif len(x.shape) >= 2:
        i = s.integer(0, len(x.shape) - 2)
        a, b = x.shape[i : i + 2]
        if isinstance(a, Length) and isinstance(b, Length):
            return
        shape = (*x.shape[:i], b * a if isinstance(a, int) else a * b, *x.shape[i + 2 :])
    else:
        shape = (*x.shape, 1)
    free = [i for i, d in enumerate(shape) if isinstance(d, Length)]
    if len(free) > 1:
        _reshape_by_arithmetic(s, x, shape)
        return
    target = [d if isinstance(d, int) else -1 for d in shape]
    if not free and target and s.chance(40):
        target[s.integer(0, len(target) - 1)] = -1
    for i, d in enumerate(target):
        if i < len(x.shape) and x.shape[i] == shape[i] and (d != -1 or s.chance(50)) and s.chance(50):
            target[i] = 0
    s.moved("Reshape", x, shape, [s.given(target)])


def _reshape_by_arithmetic(s: Sketch, x: Value, shape: tuple[Dim, ...]) -> None:
    """As exporters do: the new shape is put together from the old one's parts."""
    whole = s.node("Shape", [x], "int64", (len(x.shape),), 0, 600)
    parts = []
    for d in shape:
        if d in x.shape and isinstance(d, Length):
            index = s.given([x.shape.index(d)])
            parts.append(s.node("Gather", [whole, index], "int64", (1,), 0, 600, axis=0))
        elif isinstance(d, int):
            parts.append(s.given([d]))
        else:
            parts.append(s.given([-1]))
    target = s.node("Concat", parts, "int64", (len(shape),), -1, 600, axis=0)
    s.moved("Reshape", x, shape, [target])


def flatten(s: Sketch) -> None:
    x = s.pick(ANY, 1)
    axis = s.integer(0, len(x.shape))
    sides: list[Dim] = []
    for part in (x.shape[:axis], x.shape[axis:]):
        lengths = [d for d in part if isinstance(d, Length)]
        if len(lengths) > 1:
            return
        count = int(np.prod([d for d in part if isinstance(d, int)], initial=1))
        sides.append(lengths[0] * count if lengths else count)
    s.moved("Flatten", x, sides, axis=axis)


def transpose(s: Sketch) -> None:
    x = s.pick(ANY, 2)
    perm = list(np.random.default_rng(s.integer(0, 999)).permutation(len(x.shape)))
    s.moved("Transpose", x, [x.shape[i] for i in perm], perm=[int(i) for i in perm])


def squeeze(s: Sketch) -> None:
    x = s.pick(ANY)
    ones = [i for i, d in enumerate(x.shape) if d == 1]
    if ones and s.chance(70):
        axes = s.some(ones)
        shape = [d for i, d in enumerate(x.shape) if i not in axes]
        s.moved("Squeeze", x, shape, [s.given([any_axis(s, x, a) for a in axes])])
    elif len(x.shape) < 5:
        axis = s.integer(0, len(x.shape))
        shape = [*x.shape[:axis], 1, *x.shape[axis:]]
        s.moved("Unsqueeze", x, shape, [s.given([axis - len(shape) if s.chance(50) else axis])])


def expand(s: Sketch) -> None:
    x = s.pick(ANY, 1)
    axis = s.integer(0, len(x.shape) - 1)
    if s.most(x.shape) > 200:
        return
    if x.shape[axis] == 1 and s.chance(60):
        n = s.choice([2, 3, 4])
        target = [n if i == axis else 1 for i in range(len(x.shape))]
        s.moved("Expand", x, with_dim(x, axis, n), [s.given(target)])
    else:
        times = s.choice([2, 3])
        repeats = [times if i == axis else 1 for i in range(len(x.shape))]
        s.moved("Tile", x, with_dim(x, axis, x.shape[axis] * times), [s.given(repeats)])


def concat(s: Sketch) -> None:
    x = s.pick(ANY, 1)
    axis = s.integer(0, len(x.shape) - 1)
    others = [x if s.chance(20) else s.operand(x.dtype, with_dim(x, axis, s.choice([1, 2, 3, 8])))]
    if s.chance(30):
        others.append(s.operand(x.dtype, with_dim(x, axis, s.dim())))
    parts = [*others, x] if s.chance(50) else [x, *others]
    length: Dim = 0
    for part in parts:
        d = part.shape[axis]
        length = length + d
    if s.most(with_dim(x, axis, length)) > 800:
        return
    low, high = min(p.low for p in parts), max(p.high for p in parts)
    error = np.max([p.error for p in parts], axis=0)
    at = any_axis(s, x, axis)
    s.node("Concat", parts, x.dtype, with_dim(x, axis, length), low, high, error, axis=at)


def split(s: Sketch) -> None:
    x = s.pick(ANY, 1)
    axes = static_axes(x, 2)
    if not axes:
        return
    axis = s.choice(axes)
    d = x.shape[axis]
    assert isinstance(d, int)
    if s.chance(50):
        first = s.integer(1, d - 1)
        sizes = [first, d - first]
        extra, attrs = [s.given(sizes)], {}
    else:
        count = s.integer(2, min(d, 4))
        step = -(-d // count)
        if step * (count - 1) >= d:
            return
        sizes = [step] * (count - 1) + [d - step * (count - 1)]
        extra, attrs = [], {"num_outputs": count}
    made = [Value("", x.dtype, with_dim(x, axis, n), x.low, x.high, x.error) for n in sizes]
    s.nodes_of("Split", [x, *extra], made, axis=any_axis(s, x, axis), **attrs)


def slice_(s: Sketch) -> None:
    """One or two axes: from the start, from the end, backwards, with steps; of a symbolic axis what stays symbolic."""
    x = s.pick(ANY, 1)
    axes = s.some(range(len(x.shape)))[:2]
    starts, ends, steps, shape = [], [], [], list(x.shape)
    for axis in axes:
        d = x.shape[axis]
        if isinstance(d, Length):
            if s.chance(50) and min(s.lengths(d)) > 1:
                start, end, step, n = s.choice([(1, HUGE, 1, d + -1), (0, -1, 1, d + -1), (-1, HUGE, 1, 1)])
            else:
                start, end, step, n = -1, -HUGE, -1, d
        else:
            step = s.choice([1, 1, 1, 2, 3, -1, -2])
            low = s.integer(0, d - 1)
            high = s.integer(low + 1, d)
            if step > 0:
                start, end = (low, high) if s.chance(60) else (low - d, HUGE)
                n = len(range(d)[start:end:step])
            else:
                start, end = high - 1, (low - 1 if low else -HUGE)
                n = len(range(start, low - 1, step))
        starts.append(start)
        ends.append(end)
        steps.append(step)
        shape[axis] = n
    more = [s.given(starts), s.given(ends), s.given([any_axis(s, x, a) for a in axes]), s.given(steps)]
    s.moved("Slice", x, shape, more)


def gather(s: Sketch) -> None:
    x = s.pick(ANY, 1)
    axes = static_axes(x)
    if not axes:
        return
    axis = s.choice(axes)
    d = x.shape[axis]
    assert isinstance(d, int)
    dtype = s.choice(["int64", "int64", "int32"])
    low = -d if s.chance(30) else 0
    op = s.choice(["Gather", "Gather", "GatherElements", "GatherND"])
    if op == "Gather":
        shape = s.shape(s.integer(0, 2))
        result = (*x.shape[:axis], *shape, *x.shape[axis + 1 :])
        if s.most(result) <= 800:
            indices = s.operand(dtype, shape, low, d - 1)
            s.moved(op, x, result, [indices], axis=any_axis(s, x, axis))
    elif op == "GatherElements":
        shape = with_dim(x, axis, s.choice([1, 2, 3]))
        s.moved(op, x, shape, [s.operand(dtype, shape, low, d - 1)], axis=any_axis(s, x, axis))
    elif axis == 0:
        shape = s.shape(1)
        s.moved(op, x, (*shape, *x.shape[1:]), [s.operand("int64", (*shape, 1), low, d - 1)])


def scatter(s: Sketch) -> None:
    """Writes at indices that are all different."""
    x = s.pick(FLOATS, 1)
    d = x.shape[0]
    if not isinstance(d, int):
        return
    count = s.integer(1, d)
    order = np.random.default_rng(s.integer(0, 999)).permutation(d)[:count]
    updates = s.operand(x.dtype, with_dim(x, 0, count))
    indices = s.given(order.reshape(-1, 1))
    low, high = min(x.low, updates.low), max(x.high, updates.high)
    s.node("ScatterND", [x, indices, updates], x.dtype, x.shape, low, high, x.error)


def pad(s: Sketch) -> None:
    x = s.pick((*FLOATS, "int64", "int32"), 1)
    mode = s.choice(["constant", "reflect", "edge", "wrap"])
    before, after, shape = [], [], list(x.shape)
    for i, d in enumerate(x.shape):
        small = min(s.lengths(d))
        most = 2 if mode in ("constant", "edge") else min(2, small - 1)
        before.append(s.integer(0, most) if s.chance(60) else 0)
        after.append(s.integer(0, most) if s.chance(60) else 0)
        shape[i] = d + (before[i] + after[i])
    if s.most(shape) > 1000:
        return
    more = [s.given(before + after)]
    low, high = x.low, x.high
    if mode == "constant":
        fill = s.choice([0, 1, -1])
        low, high = min(low, fill), max(high, fill)
        if fill:
            more.append(s.given(fill, x.dtype))
        else:
            low, high = min(low, 0), max(high, 0)
    s.node("Pad", [x, *more], x.dtype, shape, low, high, x.error, mode=mode)


def blocks(s: Sketch) -> None:
    """DepthToSpace, SpaceToDepth and nearest Resize of images."""
    x = s.input(s.float, (s.choice([1, 2]), 4, 4, s.choice([2, 4])))
    n, c, h, w = (d for d in x.shape if isinstance(d, int))
    op = s.choice(["DepthToSpace", "SpaceToDepth", "Resize"])
    if op == "DepthToSpace":
        s.moved(op, x, (n, c // 4, h * 2, w * 2), blocksize=2, mode=s.choice(["DCR", "CRD"]))
    elif op == "SpaceToDepth":
        s.moved(op, x, (n, c * 4, h // 2, w // 2), blocksize=2)
    else:
        scales = s.given([1.0, 1.0, 2.0, 2.0], "float32")
        attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        s.moved(op, x, (n, c, h * 2, w * 2), [None, scales], **attrs)


def trilu(s: Sketch) -> None:
    x = s.pick(FLOATS, 2)
    more = [s.given(s.integer(-2, 2))] if s.chance(60) else []
    low, high = min(x.low, 0), max(x.high, 0)
    s.node("Trilu", [x, *more], x.dtype, x.shape, low, high, x.error, upper=s.integer(0, 1))


def one_hot(s: Sketch) -> None:
    depth = s.choice([3, 5])
    indices = s.input("int64", s.shape(s.integer(1, 2)), -depth, depth - 1)
    more = [s.given(depth), s.given([0.0, 1.0], "float32")]
    axis = s.integer(-1, len(indices.shape))
    at = len(indices.shape) if axis == -1 else axis
    shape = (*indices.shape[:at], depth, *indices.shape[at:])
    s.node("OneHot", [indices, *more], "float32", shape, 0, 1, axis=axis)


def positions(s: Sketch) -> None:
    """Range over a run-time length, as position ids are made."""
    x = s.pick(ANY, 1)
    axis = s.integer(0, len(x.shape) - 1)
    whole = s.node("Shape", [x], "int64", (len(x.shape),), 0, 1000)
    length = s.node("Gather", [whole, s.given(axis)], "int64", (), 0, 1000, axis=0)
    ids = s.node("Range", [s.given(0), length, s.given(1)], "int64", (x.shape[axis],), 0, 1000)
    if s.chance(50):
        s.node("Cast", [ids], "float32", ids.shape, 0, 1000, to=element_type("float32"))


def nonzero(s: Sketch) -> None:
    """How much it returns is known at run time only: nothing but what follows here reads it."""
    x = s.exact(("bool", "int64", "float32"), 1)
    count = s.symbol_of_data()
    found = s.node("NonZero", [x], "int64", (len(x.shape), count), 0, 1000)
    if s.chance(60):
        places = s.moved("Transpose", found, (count, len(x.shape)), perm=[1, 0])
        values = s.operand("float32", x.shape)
        s.moved("GatherND", values, (count,), [places])


def choose(s: Sketch) -> None:
    """Compress or Unique: the number of results is known at run time only."""
    x = s.exact(("int64", "float32"), 1)
    count = s.symbol_of_data()
    if s.chance(50):
        axis = s.integer(0, len(x.shape) - 1)
        condition = s.input("bool", (x.shape[axis],))
        s.moved("Compress", x, with_dim(x, axis, count), [condition], axis=axis)
    else:
        y = s.input("int64", s.shape(1), -3, 3)
        outputs = [
            Value("", "int64", (count,), y.low, y.high),
            Value("", "int64", (count,), 0, 1000),
            Value("", "int64", y.shape, 0, 1000),
            Value("", "int64", (count,), 0, 1000),
        ]
        s.nodes_of("Unique", [y], outputs, sorted=1)


def ranks(s: Sketch) -> None:
    """TopK, ArgMax and their kin, of exact values: equal ones keep their order."""
    x = s.exact(("float32", "int64"), 1)
    axes = static_axes(x)
    if not axes or not exact(x):
        return
    axis = s.choice(axes)
    d = x.shape[axis]
    assert isinstance(d, int)
    at = any_axis(s, x, axis)
    op = s.choice(["TopK", "TopK", "ArgMax", "ArgMin"])
    if op == "TopK":
        k = s.integer(1, d)
        shape = with_dim(x, axis, k)
        outputs = [Value("", x.dtype, shape, x.low, x.high), Value("", "int64", shape, 0, d)]
        s.nodes_of(op, [x, s.given([k])], outputs, axis=at, largest=s.integer(0, 1))
    elif x.dtype == "float32":
        keep = s.integer(0, 1)
        shape = with_dim(x, axis, 1) if keep else (*x.shape[:axis], *x.shape[axis + 1 :])
        s.node(op, [x], "int64", shape, 0, d, axis=at, keepdims=keep, select_last_index=s.integer(0, 1))


STEPS = [
    *(reshape, reshape, flatten, transpose, transpose, squeeze, squeeze, expand, concat, concat, split, slice_, slice_),
    *(gather, gather, scatter, pad, blocks, trilu, one_hot, positions, nonzero, choose, ranks, ranks),
]

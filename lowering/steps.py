"""Replay the steps of a decoding loop: what one of them launches is recorded, and launched again as a whole."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvq_compile.kernels.cache.gathered import gather
from kvq_compile.kernels.packed import writable
from kvq_compile.lowering.lengths import ALIGNED, Lengths
from kvq_compile.lowering.nodes import changed_roots, is_static, value_of
from kvq_compile.lowering.runtime import Compiled, Lowered, Tell

Replay = Callable[[], Sequence[Any]]
Record = Callable[[Callable[[], Sequence[Any]]], Replay]
Key = tuple[Any, ...]

MOST_TOKENS = 16  # of a call that is a step: a draft to verify, but no chunk of a prompt
LARGEST = 1 << 20  # bytes of an argument that is copied; a larger one is used where it is
KEPT = 4  # recordings: two caches in turn, before and after they grow
PAID = 2  # replays that pay for a recording
IN_VAIN = 8  # recordings in a row that were not paid for, after which no more are made
MISSES = 64  # steps in a row that no recording fits, after which none is looked for
_MODE: dict[str, Any] = {
    "capture_error_mode": "thread_local"
}  # other threads may use the GPU meanwhile
_memory = attrgetter("_lineage.memory")
_address = Tensor.data_ptr
UNSTEADY = "caches stand elsewhere in memory at every step"


@dataclass
class Recording:
    """A step as it was launched, for the addresses that it was launched with.

    Attributes:
        own: Memory of its own for arguments that stand elsewhere at every step, by place.
        held: The lengths, in a list that is empty where there are none.
        replay: Launches the step; ``None`` as long as that was only run.
        replays: How often it was launched.
        filled: Elements of own memory that the last call has filled, where there is room for more.
    """

    own: dict[int, Tensor]
    held: list[Tensor]
    replay: Replay | None = None
    replays: int = 0
    filled: dict[int, int] = field(default_factory=dict)

    def take(self, args: Sequence[Any], lengths: Sequence[int]) -> None:
        """Copy arguments of a call into own memory, which may have room for more, and its lengths."""
        for place, own in self.own.items():
            given = args[place]
            view = own
            if own.shape != given.shape:
                if given.numel() < self.filled.get(place, 0):
                    own.fill_(_hides(own.dtype))
                self.filled[place] = given.numel()
                view = own[tuple([slice(0, size) for size in given.shape])]
            view.copy_(given, non_blocking=True)
        for held in self.held:
            Lengths.fill(held, lengths)


class Steps:
    """Runs a compiled graph, and replays those of its calls that differ in nothing but what is in memory.

    A call is recorded when it is met for the second time: the first one has compiled all that it launches. Parameters
    and caches are used where they are, and a recording holds for these addresses. Other tensors, a few numbers a
    token, are copied into its own memory. Results are copies, so that they outlive the next step.

    Args:
        lowered: The graph.
        inner: Compiled from it.
        record: Records what a function launches, without launching it.
        tell: Called once with the reason why steps are not recorded any more.
    """

    def __init__(self, lowered: Lowered, inner: Compiled, record: Record, tell: Tell) -> None:
        assert lowered.lengths is not None
        self._lowered, self._lengths, self._inner = lowered, lowered.lengths, inner
        self._record, self._tell = record, tell
        self._kept: OrderedDict[Key, Recording] = OrderedDict()
        self._stopped = False
        self._in_vain = self._misses = 0
        self._sort_arguments()

    def _sort_arguments(self) -> None:
        """Sort the captured graph's arguments, by place, into those that are looked at alike at every step."""
        lowered, lengths = self._lowered, self._lengths
        self._take_caches = _taker(lowered.unwrapped)
        self._steady: list[int] = []  # those that are used where they are, and have one shape
        self._composed: list[int] = []  # of those, the ones that are made of other tensors
        self._given: list[int] = []  # other tensors
        self._numbers: list[
            int
        ] = []  # those that are no lengths; a view's offset is one, and unused
        self._behind = [(place, slots) for place, slots in lengths.numbers.items() if slots.behind]
        captured = lowered.captured
        assert captured is not None
        placeholders = lowered.module.graph.find_nodes(op="placeholder")
        unused = {node.name for node in placeholders if not node.users}
        self._written: set[int] = set()  # by the graph, which must find them where they are
        written = {node.name for node in changed_roots(lowered.module.graph.nodes)}
        for place, node in enumerate(captured.graph.find_nodes(op="placeholder")):
            if place in lowered.unwrapped:
                continue
            if not isinstance(value_of(node), Tensor):
                if place not in lengths.numbers and node.name not in unused:
                    self._numbers.append(place)
            else:
                if node.name in written:
                    self._written.add(place)
                stays = is_static(node) or (node.name in written and _has_one_shape(value_of(node)))
                (self._steady if stays else self._given).append(place)
                if is_traceable_wrapper_subclass(value_of(node)):
                    self._composed.append(place)
        self._take_steady, self._take_numbers = _taker(self._steady), _taker(self._numbers)
        self._take_written = _taker(self._written)

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        """Run the graph with the arguments of the captured one."""
        lengths = self._lengths
        tokens = lengths.tokens(args)
        if self._stopped or tokens > MOST_TOKENS:
            return self._run(args)
        held = [int(length) for length in lengths.read(args)]
        key = self._key(args, held, tokens)
        if key is None:
            return self._run(args)
        kept = self._kept  # which another thread may give up meanwhile
        found = kept.get(key)
        if found is None:
            return self._first(kept, key, args, held)
        found.take(args, held)
        if found.replay is None:
            try:
                flat = self._flatten(args, found, lengths.bounds(args, held))
                found.replay = self._record(lambda: self._inner(*flat))
            except RuntimeError as error:
                self._stop(f"recording failed: {str(error).splitlines()[0]}")
                return self._run(args)
        kept.move_to_end(key)
        found.replays += 1
        if found.replays == PAID:
            self._in_vain = 0
        self._misses = 0
        results = _copies(found.replay())
        if self._written:  # counts as written, as by operators that are launched
            torch.autograd.graph.increment_version(self._take_written(args))
        return results

    def _key(self, args: Sequence[Any], held: list[int], tokens: int) -> Key | None:
        """Return all that calls must agree in to be launched alike; ``None`` where a call cannot be recorded.

        Bounds of lengths follow from the caches' memory where all lengths are equal.
        """
        if any(args[place] != slots.of(held, tokens) for place, slots in self._behind):
            return None
        padded = self._lengths.padded
        given: list[Any] = []
        for place in self._given:
            x = args[place]
            if place in padded:
                dim, slots = padded[place]
                sizes = list(x.shape)
                if sizes[dim] != slots.of(held, tokens) or not x.is_contiguous():
                    return None
                sizes[dim] = 0
                given.append(tuple(sizes))
            else:
                given.append((tuple(x.shape), x.stride(), self._address(place, x)))
        apart = len(set(held)) > 1
        caches = self._take_caches(args)
        memories = tuple(map(_memory, caches))
        if None in memories:
            gather(caches)
            memories = tuple(map(_memory, caches))
        return (
            tokens,
            memories,
            tuple(map(_address, self._take_steady(args))),
            tuple([_addresses(args[place]) for place in self._composed]),
            tuple(given),
            self._take_numbers(args),
            tuple(self._lengths.bounds(args, held)) if apart else (),
        )

    def _address(self, place: int, x: Tensor) -> int | None:
        """Return the address of an argument that is used where it is; ``None`` of one that is copied.

        One that is written, or whose elements overlap, has to stay where it is.
        """
        copied = x.nbytes <= LARGEST and 0 not in x.stride() and place not in self._written
        return None if copied else x.data_ptr()

    def _run(self, args: Sequence[Any]) -> Sequence[Any]:
        results: Sequence[Any] = self._inner(*self._lowered.flatten(args))
        return results

    def _first(
        self, kept: OrderedDict[Key, Recording], key: Key, args: Sequence[Any], held: list[int]
    ) -> Sequence[Any]:
        """Run a call that no recording fits, and make ready for recording the next one like it."""
        lengths = self._lengths
        tokens, bounds = lengths.tokens(args), lengths.bounds(args, held)
        own: dict[int, Tensor] = {}
        with writable():
            for place in self._given:
                x = args[place]
                if place in lengths.padded:
                    dim, slots = lengths.padded[place]
                    sizes = list(x.shape)
                    sizes[dim] = slots.of(bounds, tokens)
                    own[place] = x.new_full(sizes, _hides(x.dtype))
                elif self._address(place, x) is None:
                    own[place] = torch.empty_strided(
                        x.shape, x.stride(), dtype=x.dtype, device=x.device
                    )
            rows = len(held), ALIGNED
            values = [torch.zeros(rows, dtype=torch.int64, device=lengths.device)] if held else []
        kept[key] = made = Recording(own, values)
        self._misses += 1
        while len(kept) > KEPT:
            _, old = kept.popitem(last=False)
            self._in_vain += old.replay is not None and old.replays < PAID
        if self._in_vain >= IN_VAIN or self._misses >= MISSES:
            self._stop(UNSTEADY)
        made.take(args, held)
        return _copies(self._inner(*self._flatten(args, made, bounds)))

    def forget(self) -> None:
        """Give up what is recorded, as soon as no step of another thread uses it."""
        self._kept = OrderedDict()

    def _stop(self, reason: str) -> None:
        self._stopped = True
        self.forget()
        self._tell(reason)

    def _flatten(self, args: Sequence[Any], recording: Recording, bounds: list[int]) -> list[Any]:
        """Return the graph's arguments with bounds for lengths and own memory for what is copied."""
        lowered, lengths = self._lowered, self._lengths
        tokens = lengths.tokens(args)
        flat: list[Any] = []
        for place, arg in enumerate(args):
            if place in lowered.unwrapped:
                flat.extend(arg.parts)
                flat.extend(arg.calibrated)
                if lowered.unwrapped[place]:
                    flat.append(bounds[lengths.row_of(place)])
            elif place in lengths.numbers:
                flat.append(lengths.numbers[place].of(bounds, tokens))
            else:
                flat.append(recording.own.get(place, arg))
        return flat + lowered.tables + recording.held


def _taker(places: Iterable[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what takes the arguments at some places."""
    known = tuple(places)
    if len(known) < 2:  # of one, `itemgetter` returns no tuple
        return lambda args: tuple([args[place] for place in known])
    return itemgetter(*known)


def _addresses(x: Any) -> Any:
    """Return where a tensor stands in memory; of one that is made of others, which has no address, where those do."""
    if not is_traceable_wrapper_subclass(x):
        return x.data_ptr()
    parts = (getattr(x, name) for name in x.__tensor_flatten__()[0])
    return tuple([_addresses(part) for part in parts if isinstance(part, Tensor)])


def _has_one_shape(x: Tensor) -> bool:
    """Return whether Dynamo lets no call pass in which the tensor has another shape."""
    return not any(isinstance(size, torch.SymInt) for size in (*x.shape, *x.stride()))


def _hides(dtype: torch.dtype) -> float:
    """Return what hides a cache position in a mask of some dtype."""
    return torch.finfo(dtype).min if dtype.is_floating_point else 0


def _copies(results: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in results]


_pools: dict[int, tuple[Any, torch.cuda.CUDAGraph]] = {}


def _pool(device: int) -> Any:
    """Return the memory pool of a GPU's recordings, which an empty recording keeps alive between others."""
    if device not in _pools:
        handle, empty = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with warnings.catch_warnings(), torch.cuda.graph(empty, pool=handle, **_MODE):
            warnings.simplefilter("ignore")  # that it is empty
        _pools[device] = handle, empty
    return _pools[device][0]


def record_on_gpu(run: Callable[[], Sequence[Any]]) -> Replay:
    """Record what a function launches on the current GPU as a CUDA graph.

    All recordings allocate from one pool, for they are launched one after another and their results are copied.

    Raises:
        RuntimeError: The function waits for the GPU, or does something else that cannot be recorded.
    """
    pool = _pool(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, **_MODE):
        results = run()

    def replay() -> Sequence[Any]:
        graph.replay()
        return results

    return replay

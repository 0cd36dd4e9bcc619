"""What is done to all caches of a call at once is what would be done to each."""

from typing import Any

import pytest
import torch

from kvq_compile import QuantizedKV, make_spec
from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.form import form_of
from kvq_compile.kernels.cache.together import extended, have_room
from kvq_compile.kernels.cache.views import MANY

SPEC = make_spec("int8", sinks=1, window=4, page_size=32)


def caches(tokens: int = 60, count: int = 4) -> list[QuantizedKV]:
    made = []
    for number in range(count):
        x = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(number))
        made.append(QuantizedKV.from_dense(x, SPEC.layout(("key", "value")[number % 2], 32)))
    return made


def appended(views: list[QuantizedKV], tokens: int, number: int = 0) -> None:
    """Append in place, as a graph does."""
    x = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(100 + number))
    for view in views:
        view.claim(tokens)
        ops.append_(view.parts, view.calibrated, x, None, view.end, view.page_layout)


def state(view: QuantizedKV) -> dict[str, Any]:
    lineage = view._lineage
    told = {name: vars(view)[name] for name in ("page_layout", "kind", "_length")}
    about = {"held": lineage.held, "pages": lineage.pages}
    about["dynamic"] = vars(view).get("_dynamo_weak_dynamic_indices")
    return told | about | {"shape": tuple(view.shape), "form": form_of(view), "first": view.first}


@pytest.mark.parametrize("change", ["none", "trimmed", "sliced", "reopened", "of other lengths"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_views_that_are_made_together_are_those_made_one_by_one(tokens: int, change: str) -> None:
    """Through pages that fill up, of which one was cut open."""

    def changed() -> list[QuantizedKV]:
        made = caches()
        if change == "trimmed":
            made[1] = made[1][:, :, 5:]  # type: ignore[assignment]
        if change == "sliced":
            made[1]._is_slice_copy = True
        if change == "reopened":
            made[1:3] = [x[:, :, :20] for x in made[1:3]]  # type: ignore[misc]
        if change == "of other lengths":
            made[1:] = caches(37)[1:]
        return made

    mine, theirs = changed(), changed()
    for number in range(3):
        appended(mine, tokens, number)
        appended(theirs, tokens, number)
        mine, theirs = extended(mine, tokens), [view.extended(tokens) for view in theirs]
        assert list(map(state, mine)) == list(map(state, theirs))
        assert not any(view._is_slice_copy for view in mine)
        assert all(view._lineage.compiled == view.end for view in mine)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.dequantize(), other.dequantize())


def test_older_views_remain_prefixes() -> None:
    views = caches()
    before = [view.dequantize() for view in views]
    appended(views, 3)
    longer = extended(views, 3)
    assert [view.shape[2] for view in views] == [60] * 4
    for old, new, was in zip(views, longer, before, strict=True):
        assert new is not old
        assert old in new._lineage.others(new)
        assert torch.equal(old.dequantize()[:, :, -4:], was[:, :, -4:])


def test_what_a_user_notes_at_a_view_is_not_passed_on() -> None:
    views = caches()
    views[2].mine = 5  # type: ignore[attr-defined]
    appended(views, 1)
    assert not any(hasattr(view, "mine") for view in extended(views, 1))


def shared(view: QuantizedKV) -> QuantizedKV:
    view.share_memory_()
    return view


def outgrown(view: QuantizedKV) -> QuantizedKV:
    """A longer view was made, and is gone: the next append has to drop its tokens."""
    view.extended(1)
    return view


@pytest.mark.parametrize(
    "change",
    [
        lambda view: view[:, :, :50],
        lambda view: view[:, :, 5:],
        shared,
        lambda view: caches(61)[1],
        outgrown,
    ],
)
def test_room_is_not_taken_for_granted_where_a_view_differs(change: Any) -> None:
    views = caches()
    for view in views:
        view.claim(2)
    assert have_room(views, 1)
    assert not have_room(views, 500)
    views[1] = change(views[1])
    assert not have_room(views, 1)


def test_views_that_are_gone_are_forgotten() -> None:
    """Where nobody keeps them, a memory remembers a few at most."""
    (view,) = caches(count=1)
    for _ in range(5 * MANY):
        appended([view], 1)
        (view,) = extended([view], 1)
    assert len(view._lineage._views) <= MANY
    assert view._lineage.others(view) == []

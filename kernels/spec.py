"""`CacheSpec`: the options of a whole cache, from which the `Layout` of each key or value tensor is made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.mixed_scheme import Mixed
from kvq_compile.kernels.schemes import Role, Scheme, Uniform
from kvq_compile.kernels.tables import NO_TABLES, Tables
from kvq_compile.kernels.values import check

LEAST_PAGE = 32
PAGE_ELEMENTS = 1 << 15  # of a page, padded to a power of two channels, that a GPU can hold at once
QUERIES = 5  # last queries that a key cache holds where bits depend on queries: the paper's attention window


@dataclass(frozen=True)
class CacheSpec:
    """Options of a whole cache: exact regions, a scheme for keys and one for values, overrides of layers.

    Args:
        key, value: Quantization schemes of packed keys and values.
        sinks: First tokens, which always stay exact.
        window: Most recent tokens that are always exact; up to ``page_size - 1`` more wait until their page is full.
        page_size: Tokens quantized together: 32, 64, 128 or 256.
        layers: ``(layer index, CacheSpec or None)`` pairs that replace this spec for single layers; layers are
            counted in the order in which the model runs its attentions. ``None`` leaves the layer in 16 bit.
        method: Name of this spec in reports.
        key_tables, value_tables: Calibration tables; the schemes name them by their digest.

    Raises:
        TypeError: A count of tokens is not an integer.
        ValueError: An argument is out of its range, or tables are not those that a scheme names.
    """

    key: Scheme = field(default_factory=Uniform)
    value: Scheme = field(default_factory=Uniform)
    sinks: int = 5
    window: int = 128
    page_size: int = 128
    layers: tuple[tuple[int, CacheSpec | None], ...] = ()
    method: str = "custom"
    key_tables: Tables | None = None
    value_tables: Tables | None = None

    def __post_init__(self) -> None:
        _ = self.regions  # runs the checks of `Regions`
        check(
            self.key.reader == self.value.reader,
            "keys and values must both be in mixed pages, or neither, "
            f"got {self.key.name} and {self.value.name}",
        )
        adaptive = self.key.adaptive
        check(
            adaptive is None or adaptive.target == 0 or adaptive.query_norm > 0,
            "query_norm must be positive for a target of keys, got 0",
        )
        for name, scheme, tables in (
            ("key_tables", self.key, self.key_tables),
            ("value_tables", self.value, self.value_tables),
        ):
            given = NO_TABLES if tables is None else tables.digest
            check(
                given == scheme.tables,
                f"{name} must be those that its scheme names, {scheme.tables!r}, got {given!r}",
            )

    @property
    def regions(self) -> Regions:
        """Which tokens are exact."""
        return Regions(self.sinks, self.window, self.page_size)

    def for_layer(self, layer: int) -> CacheSpec | None:
        """Return the spec of one layer, or ``None`` if it stays in 16 bit."""
        for index, override in self.layers:
            if index == layer:
                return override
        return replace(self, layers=()) if self.layers else self

    def scheme(self, role: Role) -> Scheme:
        """Return the scheme of keys or of values."""
        return self.key if role == "key" else self.value

    def tables(self, role: Role) -> Tables | None:
        """Return the calibration tables of keys or of values."""
        return self.key_tables if role == "key" else self.value_tables

    def layout(
        self, role: Role, head_dim: int, shared_by: int = 0, widest: int | None = None
    ) -> Layout:
        """Bind this spec to the keys or values of heads of ``head_dim`` channels.

        Args:
            role: Whether the tensor holds keys or values.
            head_dim: Channels of a head.
            shared_by: Queries per KV head; 0 if not known. Where bits depend on queries and it is known, a key
                cache also holds the last queries.
            widest: Channels of the larger of keys and values; ``None``: both have ``head_dim``. Pages of more than
                256 channels have fewer tokens than ``page_size``, since a GPU holds a page at a time.

        Raises:
            ValueError: ``head_dim`` cannot be packed or grouped as the scheme asks.
        """
        asks = self.key.asks_queries or self.value.asks_queries
        shared_by = shared_by if asks and role == "key" else 0
        regions, scheme = self._regions_of(widest or head_dim), self.scheme(role)
        if isinstance(scheme, Mixed) and regions.page_size < self.page_size:
            scheme = scheme.in_whole_rows(regions.page_size)
        return _layout(
            *(role, head_dim, regions, scheme),
            *((QUERIES if shared_by else 0), shared_by),
        )

    def _regions_of(self, widest: int) -> Regions:
        """Return the regions with pages that a GPU can hold, of heads of up to ``widest`` channels."""
        groups = [  # by channel, which a page holds whole
            scheme.group_size or 0
            for scheme in (self.key, self.value)
            if isinstance(scheme, Uniform) and scheme.grouping == "channel" and not scheme.up_to
        ]
        page_size, least = self.page_size, max(LEAST_PAGE, *groups, 0)
        while page_size > least and page_size << (widest - 1).bit_length() > PAGE_ELEMENTS:
            page_size //= 2
        return replace(self.regions, page_size=page_size)


@lru_cache(maxsize=1024)
def _layout(
    role: Role, head_dim: int, regions: Regions, scheme: Scheme, queries: int, shared_by: int
) -> Layout:
    return Layout(role, head_dim, regions, scheme, queries, shared_by)  # one object for one value

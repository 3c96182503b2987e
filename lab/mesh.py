"""Where a program runs: one device, one run on many, or many runs side by side.

One run on many devices: the batch is cut over `data` and `fsdp`, matrices over `fsdp` (by their D) and `tensor` (by their
heads, F or V); XLA's partitioner adds the collectives (Xu et al. 2021, arXiv 2105.04663). Where an axis of a parameter can
not be divided it stays whole. Many runs side by side: the runs are cut over all devices, and nothing is exchanged.

Letters: B batch, k steps in one dispatch, R runs side by side.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that cut a batch
# Which axis of the mesh cuts which axis of a parameter, by the letters that its name ends in (lab.layers).
CUT = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} = {getattr(self, name)}: use at least 1")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @classmethod
    def read(cls, text: str) -> "Mesh":
        """'data=4,fsdp=2'; an axis that is not named has one device."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = part.partition("=")
            if name.strip() not in AXES or not size.strip().isdigit():
                raise ValueError(
                    f"mesh = {text!r}: use {', '.join(AXES)} with numbers of devices, such as data=4,fsdp=2"
                )
            sizes[name.strip()] = int(size)
        return cls(**sizes)

    def check_devices(self) -> None:
        """Raises ValueError where there are not so many."""
        if self.devices not in (1, jax.device_count()):
            raise ValueError(
                f"mesh {self}: {self.devices} devices, but JAX sees {jax.device_count()}: use all of them, or one"
            )

    def check(self, batch: int, pack: int = 1) -> None:
        """As check_devices, and where they can not share the work evenly."""
        self.check_devices()
        rows = self.data * self.fsdp
        if pack == 1 and batch % rows:
            raise ValueError(f"mesh {self}: batch = {batch} can not be cut in {rows}: let data * fsdp divide the batch")
        if pack > 1 and pack % self.devices:
            raise ValueError(f"mesh {self}: {pack} runs side by side can not be cut over {self.devices} devices")

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in asdict(self).items() if size > 1) or "one device"


ONE_DEVICE = Mesh()


def choose(batch: int, devices: int, *, pack: int = 1, cut_matrices: bool = False) -> Mesh:
    """All devices where they can share the work evenly, by runs or by batch (and then by heads), else one. cut_matrices:
    those that share the batch share the matrices too, since one could not hold them."""
    if pack > 1:
        return Mesh(data=devices) if pack % devices == 0 else ONE_DEVICE
    rows = math.gcd(batch, devices)
    if rows == 1:
        return ONE_DEVICE
    return Mesh(**{"fsdp" if cut_matrices else "data": rows}, tensor=devices // rows)


@lru_cache(maxsize=8)
def _made(mesh: Mesh) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(getattr(mesh, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding(mesh: Mesh, *axes: Any) -> NamedSharding:
    return NamedSharding(_made(mesh), PartitionSpec(*axes))


@contextlib.contextmanager
def traced_on(mesh: Mesh, *, pack: int = 1) -> Iterator[None]:
    """While a program of one run on many devices is traced; `by_batch` then means something."""
    if mesh.devices == 1 or pack > 1:
        yield
        return
    with jax.set_mesh(_made(mesh)):
        yield


def by_batch(x: Array, axis: int = 0) -> Array:
    """Says that activations are cut by their batch; parameters are cut otherwise, and the compiler might follow them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[axis] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, BATCH))


def whole(table: Array) -> Array:
    """A token table on every device, since rows are looked up by tokens of any part of the batch."""
    return table if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(table, PartitionSpec())


def of_state(mesh: Mesh, state: Any, *, pack: int = 1) -> Any:
    """The shapes of a training state, or of its parameters, with where each lies."""
    if mesh.devices == 1:
        return state

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        axes = (AXES,) if pack > 1 else _cut(mesh, str(getattr(path[-1], "key", "")), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, *axes))

    return jax.tree_util.tree_map_with_path(placed, state)


def _cut(mesh: Mesh, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    letters = name.rpartition("_")[2]
    if not 2 <= len(letters) <= len(shape) or not letters.isupper():
        return ()  # a norm's scale or a counter: small, and everywhere
    cut: list[str | None] = [None] * len(shape)
    for place, letter in enumerate(letters, start=len(shape) - len(letters)):
        axis = CUT.get(letter)
        if axis and axis not in cut and shape[place] % getattr(mesh, axis) == 0:
            cut[place] = axis
    return tuple(cut)


def of_batches(mesh: Mesh, *, pack: int = 1) -> NamedSharding | None:
    """Of arrays [k, B, ...]; of many runs [k, R, B, ...], cut by runs."""
    return None if mesh.devices == 1 else sharding(mesh, None, AXES if pack > 1 else BATCH)


def of_batch(mesh: Mesh, size: int) -> NamedSharding | None:
    """Of arrays [B, ...] of this size: cut where it can be divided."""
    if mesh.devices == 1:
        return None
    return sharding(mesh, *[BATCH] * (size % (mesh.data * mesh.fsdp) == 0))


def everywhere(mesh: Mesh) -> NamedSharding | None:
    """Of small results: every host reads the whole of it."""
    return None if mesh.devices == 1 else sharding(mesh)


def my_rows(mesh: Mesh, batch: int) -> range:
    """The rows of a batch that this process' devices need: others build the rest."""
    if jax.process_count() == 1:
        return range(batch)
    cut = sharding(mesh, BATCH).addressable_devices_indices_map((batch,))
    bounds = [rows[0].indices(batch) for rows in cut.values() if rows is not None]
    return range(min(low for low, _, _ in bounds), max(high for _, high, _ in bounds))


def put(
    array: np.ndarray, where: NamedSharding | None, *, axis: int = 0, first: int = 0, rows: int | None = None
) -> Any:
    """A host's numbers on the devices. Along `axis` a host may have only a part of the `rows`, from `first` on."""
    if where is None:
        return array
    shape = list(array.shape)
    shape[axis] = rows if rows is not None else shape[axis]

    def part(index: Any) -> np.ndarray:
        low, high, _ = index[axis].indices(shape[axis])
        return array[(*index[:axis], slice(low - first, high - first), *index[axis + 1 :])]

    return jax.make_array_from_callback(tuple(shape), where, part)


def gather(mesh: Mesh) -> Callable[[Any], np.ndarray]:
    """Brings one array to every host, whole."""
    if mesh.devices == 1 or jax.process_count() == 1:
        return np.asarray
    whole = jax.jit(lambda x: x, out_shardings=everywhere(mesh))
    return lambda leaf: np.asarray(whole(leaf))


def read_hosts(words: str) -> tuple[str, int, int] | None:
    """Address and port of the first host, how many processes, which this is; None of 'auto'."""
    if words == "auto":
        return None
    address, _, numbers = words.partition(",")
    count, _, number = numbers.partition(",")
    if not (":" in address and count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise ValueError(
            f"hosts = {words!r}: use the first host's address and port, the number of processes and this one's (from 0), such "
            "as 10.0.0.1:9876,2,0; or auto"
        )
    return address, int(count), int(number)


def join_hosts(words: str) -> None:
    """Makes one machine of several: 'address:port,processes,number' of this process, or 'auto' where JAX knows them."""
    if (named := read_hosts(words)) is None:
        jax.distributed.initialize()
    else:
        address, processes, number = named
        jax.distributed.initialize(address, processes, number)

"""Random numbers that depend on a key, not on the program's history.

The key is (seed, purpose, sample): the same key gives the same numbers after any other calls, with any number of
processes or workers, and after a resume. The global generators are not used.
"""

import hashlib
import operator
from collections.abc import Iterable, Iterator

import numpy as np
import torch

Key = int | str


def key_seed(seed: int, *keys: Key) -> int:
    """Return a 63-bit hash of ``seed`` and ``keys``, the same on all machines, processes and Python versions.

    Type and length of each key go into the hash: ``("1",)``, ``(1,)`` and ``(1, 1)``, ``(11,)`` are all different.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (operator.index(seed), *keys):
        kind, text = ("s", key) if isinstance(key, str) else ("i", str(operator.index(key)))
        data = text.encode()
        digest.update(f"{kind}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def key_seeds(seed: int, purpose: str, samples: Iterable[str]) -> Iterator[int]:
    """Yield ``key_seed(seed, purpose, sample)`` of each of many samples, in half the time."""
    begun = hashlib.blake2b(digest_size=8)
    for part in (f"i{len(str(operator.index(seed)))}:{seed}", f"s{len(purpose.encode())}:{purpose}"):
        begun.update(part.encode())
    for sample in samples:
        digest, data = begun.copy(), sample.encode()
        digest.update(b"s%d:%b" % (len(data), data))
        yield int.from_bytes(digest.digest(), "little") >> 1


def generator(seed: int, *keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh torch generator for this key.

    Keep the default device for everything that affects a result: other kinds of devices give other numbers for the same
    seed. torch's CPU generator uses the low 32 bits of its seed, so among n keys about n**2 / 2**33 pairs share a
    stream: harmless for noise, but do not use it for unique identifiers.
    """
    return torch.Generator(device=device).manual_seed(key_seed(seed, *keys))


def numpy_rng(seed: int, *keys: Key) -> np.random.Generator:
    """Return a fresh numpy generator for this key."""
    return np.random.default_rng(key_seed(seed, *keys))


def noise(
    shape: tuple[int, ...] | torch.Size, seed: int, *keys: Key, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return standard normal noise of ``shape`` for this key, on the CPU; sampled in float32, then cast to ``dtype``,
    so that noise in half precision is the same up to rounding."""
    return torch.randn(shape, generator=generator(seed, *keys), dtype=torch.float32).to(dtype)

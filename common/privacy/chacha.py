"""ChaCha20 (RFC 8439, §2.3) on tensors: a cryptographic stream that a GPU makes itself.

torch's own generators on a GPU are fast and not cryptographic; AES on the processor is both, but a
step's noise for five million weights would take longer to make there, and to bring over, than the
step does. Every word here is the standard's: the tests compare with the library ``cryptography``.

On a GPU the blocks are made by one kernel, which torch compiles from :data:`_KERNEL` when it is
first needed; it is looked at once whether it gives what the tensor operations give, and where it
does not, or cannot be compiled, those serve.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("consilium.privacy")

KEY_BYTES = 32
PAIRS = 8
"""A block's sixteen 32-bit words, two by two."""
MOST_BLOCKS = 1 << 31
"""The counter's range, of what is signed here: 128 GiB under one key."""
_CONSTANTS = struct.unpack("<4i", b"expand 32-byte k")
_DOUBLE_ROUNDS = 10
_LOW = (1 << 32) - 1


def key_tensor(key: bytes, device: torch.device) -> Tensor:
    """A key as (4,) int64 on ``device``; ValueError for one of another length."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a ChaCha20 key has {KEY_BYTES} bytes, not {len(key)}")
    return torch.tensor(struct.unpack("<4q", key), dtype=torch.int64, device=device)


def keystream(key: Tensor, start: int, blocks: int) -> Tensor:
    """Blocks ``start`` … of the stream of ``key`` with a nonce of zeros: (8, blocks) int64.

    ``key`` is of :func:`key_tensor`; its values are read when the device gets there, so that a
    recorded graph takes those of the moment. Column i holds block ``start`` + i: the standard's
    words in their order, two of 32 bits in each number, the first in its lower half. ValueError for
    a counter that would begin anew.
    """
    if not 0 <= start <= start + blocks <= MOST_BLOCKS:
        raise ValueError("one key's counter would be used twice")
    if key.is_cuda and (kernel := _kernel()) is not None:
        counter = torch.arange(start, start + blocks, dtype=torch.int64, device=key.device)
        return torch.stack(kernel(counter, *key.unbind()))
    return _by_operations(key, start, blocks)


def _by_operations(key: Tensor, start: int, blocks: int) -> Tensor:
    words = torch.stack([key, key >> 32], 1).view(-1).to(torch.int32)
    first = torch.zeros(16, blocks, dtype=torch.int32, device=key.device)
    for row, constant in enumerate(_CONSTANTS):
        first[row] = constant
    first[4:12] = words.unsqueeze(1)
    first[12] = torch.arange(start, start + blocks, dtype=torch.int32, device=key.device)
    # A row of the standard's 4×4 matrix each, so that its four columns go through a round together.
    a, b, c, d = (row.clone() for row in first.view(4, 4, blocks))
    for _ in range(_DOUBLE_ROUNDS):
        _quarter_rounds(a, b, c, d)
        # Diagonals become columns, and columns again.
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    found = torch.cat([a, b, c, d]).add_(first).view(PAIRS, 2, blocks).to(torch.int64)
    return (found[:, 0] & _LOW) | (found[:, 1] << 32)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Four quarter rounds (§2.1) at once, in place."""
    for target, other, turned, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        target.add_(other)  # modulo 2^32: int32 wraps around
        turned.bitwise_xor_(target)
        high = turned << by
        turned.bitwise_right_shift_(32 - by).bitwise_and_((1 << by) - 1).bitwise_or_(high)


_KERNEL = """
template <typename T>
void chacha20_block(T counter, T k0, T k1, T k2, T k3,
                    T& o0, T& o1, T& o2, T& o3, T& o4, T& o5, T& o6, T& o7) {
  unsigned int x[16], s[16];
  s[0] = 0x61707865u; s[1] = 0x3320646eu; s[2] = 0x79622d32u; s[3] = 0x6b206574u;
  T k[4] = {k0, k1, k2, k3};
  for (int i = 0; i < 4; ++i) {
    s[4 + 2 * i] = (unsigned int)((unsigned long long)k[i]);
    s[5 + 2 * i] = (unsigned int)((unsigned long long)k[i] >> 32);
  }
  s[12] = (unsigned int)counter; s[13] = 0u; s[14] = 0u; s[15] = 0u;
  for (int i = 0; i < 16; ++i) x[i] = s[i];
  const int q[8][4] = {{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15},
                       {0,5,10,15},{1,6,11,12},{2,7,8,13},{3,4,9,14}};
  #pragma unroll
  for (int r = 0; r < 10; ++r) {
    #pragma unroll
    for (int j = 0; j < 8; ++j) {
      unsigned int a = x[q[j][0]], b = x[q[j][1]], c = x[q[j][2]], d = x[q[j][3]];
      a += b; d ^= a; d = (d << 16) | (d >> 16);
      c += d; b ^= c; b = (b << 12) | (b >> 20);
      a += b; d ^= a; d = (d << 8) | (d >> 24);
      c += d; b ^= c; b = (b << 7) | (b >> 25);
      x[q[j][0]] = a; x[q[j][1]] = b; x[q[j][2]] = c; x[q[j][3]] = d;
    }
  }
  unsigned long long o[8];
  for (int i = 0; i < 8; ++i)
    o[i] = (unsigned long long)(x[2 * i] + s[2 * i])
         | ((unsigned long long)(x[2 * i + 1] + s[2 * i + 1]) << 32);
  o0 = (T)o[0]; o1 = (T)o[1]; o2 = (T)o[2]; o3 = (T)o[3];
  o4 = (T)o[4]; o5 = (T)o[5]; o6 = (T)o[6]; o7 = (T)o[7];
}
"""
"""One block for each counter."""


@cache
def _kernel() -> Callable[..., Any] | None:
    """The compiled kernel; None where it cannot be had, or gives anything else."""
    try:
        made = torch.cuda.jiterator._create_multi_output_jit_fn(_KERNEL, num_outputs=PAIRS)
        device = torch.device("cuda")
        key = key_tensor(bytes(range(100, 132)), device)
        counter = torch.arange(7, 1007, dtype=torch.int64, device=device)
        same = torch.equal(torch.stack(made(counter, *key.unbind())), _by_operations(key, 7, 1000))
    except Exception as error:  # whatever a compiler may raise: the same numbers come without it
        log.warning("noise on the GPU is made without a kernel of its own, slower: %s", error)
        return None
    if not same:
        log.warning("noise on the GPU is made without a kernel of its own: it gave other numbers")
        return None
    found: Callable[..., Any] = made
    return found

"""Barriers, fences, and where threads meet."""

from __future__ import annotations

from typing import Any

from pallas_kernels.ptx.values import Int, asm, nvvm, raw


def barrier_init(address: Int, count: int) -> None:
    asm([], "mbarrier.init.shared::cta.b64 [$0], $1;", address, count)


def barrier_expect(address: Int, nbytes: Any) -> None:
    """One arrival, and `nbytes` more to come."""
    asm([], "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", address, nbytes)


def barrier_arrive(address: Int) -> None:
    asm([], "mbarrier.arrive.shared::cta.b64 _, [$0];", address)


def barrier_wait(address: Int, parity: Any, scope: str = "cta") -> None:
    """Waits until the phase of this parity has completed.

    Args:
      scope: "cluster" where stores of other blocks must be visible after it. That invalidates the L1 cache, which
        costs hundreds of cycles, so the barriers of copies are waited for at scope "cta".
    """
    acquire = ".acquire.cluster" if scope == "cluster" else ""
    asm(
        [],
        f"{{ .reg .pred done; WAIT: mbarrier.try_wait.parity{acquire}.shared::cta.b64 done, [$0], $1; "
        "@done bra DONE; bra WAIT; DONE: }",
        address,
        parity,
    )


def fence_barrier_init() -> None:
    asm([], "fence.mbarrier_init.release.cluster;")


def fence_async() -> None:
    """Shared memory written by ordinary stores becomes visible to the copy engine and the tensor cores."""
    asm([], "fence.proxy.async.shared::cta;")


def sync_warp() -> None:
    """Joins the lanes of a warp. Belongs behind every branch on a thread's number in front of an instruction for whole
    warps (mma, ldmatrix, wgmma, barriers): LLVM does not know that inline PTX must not be copied into both sides of a
    branch (seen: a wgmma loop that hung, because thread 0 had got a copy of its own). It knows it of this operation.
    """
    nvvm.bar_warp_sync(raw(0xFFFFFFFF))


def sync_block() -> None:
    asm([], "barrier.sync 0;")


def cluster_arrive(relaxed: bool = False) -> None:
    """relaxed: without the fence (a global one, slow), where no data but only progress is announced."""
    asm([], f"barrier.cluster.arrive.{'relaxed' if relaxed else 'release'};")


def cluster_wait() -> None:
    asm([], "barrier.cluster.wait.acquire;")

"""The blocks of the wgmma kernel together cover every unit of the weight, every tile of x and every step just once."""

import dataclasses
import itertools
from collections import Counter

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip(f"jax {jax.__version__}: Mosaic GPU of 0.11 is needed", allow_module_level=True)

from pallas_kernels.form import Form
from pallas_kernels.skeletons import gemm_work
from pallas_kernels.skeletons.gemm_plan import Config, Plan


@pytest.fixture
def plain_integers(monkeypatch):
    """The kernel's integers as Python's: the same expressions, computed instead of emitted."""
    monkeypatch.setattr(gemm_work, "Int", int)
    monkeypatch.setattr(gemm_work.ptx, "select", lambda condition, yes, no: yes if condition else no)


EVEN = Config(64, 4, 2, even=True, ahead=False)


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (64, 28672, 4096, EVEN),
        (64, 28672, 4096, dataclasses.replace(EVEN, even=False)),
        (70, 200, 512, dataclasses.replace(EVEN, wn=2)),
        (300, 64, 1024, Config(128, 2, 2, even=True)),
        (100, 4096, 1984, Config(64, 3, 2, even=True)),
        (700, 6144, 1024, Config(256, 2, 1, even=True)),
        (5000, 9000, 1024, Config(256, 2, 1, even=True, blocks=114)),
        (300, 1000, 1024, Config(128, 2, 2, share=2, split=2, blocks=120)),
        (500, 4096, 1984, Config(128, 3, 2, split=4, blocks=120)),
        (5000, 2000, 1024, Config(256, 2, 1, share=2, m_group=4)),
        (256, 6144, 4096, Config(128, 3, 1, split=2, tail=2)),
        (700, 6144, 1984, Config(96, 2, 2, split=2, tail=4, ahead=False)),
        (16, 4096, 4096, Config(16, 4, 4, split=2, units=1, ahead=False)),
        (100, 9000, 1984, Config(64, 4, 2, units=2, ahead=False)),
        (64, 57344, 1024, Config(64, 4, 2, units=7, ahead=False)),
    ],
)
def test_every_step_once(plain_integers, m, n, k, config):
    plan = Plan(m, n, k, Form(), config, "bf16")
    assert plan.reason() is None
    seen, longest = Counter(), 0  # of columns: both halves of a tile of x
    for cluster in range(plan.clusters):
        for rank in range(plan.cluster):
            if config.even:
                work = gemm_work.Pairs(plan, cluster, rank)
            else:
                work = gemm_work.Tiles(plan, cluster, rank % config.share, rank // config.share)
            busy = 0
            for t in range(work.passes):
                tile, first = work.tile(t)
                for i in range(plan.block_units):
                    share = work.share(t, first, i)
                    busy += share.end - share.begin
                    steps = list(range(share.begin, share.end))
                    steps = [work.place(t, step) for step in steps] if config.even else steps
                    steps = list(itertools.product(steps, (0, 1)))
                    steps += [(step, rank) for step in range(*work.tail)] if config.tail else []
                    seen.update((tile, share.unit, *step) for step in steps)
            longest = max(longest, busy)
    wanted = set(itertools.product(range(plan.m_tiles), range(plan.units), range(plan.steps), (0, 1)))
    assert all(seen[one] == 1 for one in wanted)
    if config.even:
        assert set(seen) == wanted
        groups = plan.tiles // plan.m_tiles
        assert longest <= (-(-plan.units // groups) + 1) / 2 * plan.steps


def test_warpgroups_and_units():
    config = Config(64, 4, 2, ahead=False)
    for units, depth, heights in ((0, 1, [1]), (4, 1, [1]), (1, 4, [1]), (2, 2, [1]), (7, 1, [2, 1]), (8, 1, [2])):
        plan = Plan(64, 4096, 4096, Form(), dataclasses.replace(config, units=units), "bf16")
        assert plan.reason() is None
        assert (plan.depth, plan.heights) == (depth, heights)
        assert plan.stages % depth == 0  # a slot is always the same warpgroup's
    assert "3 units" in Plan(64, 4096, 4096, Form(), dataclasses.replace(config, units=3), "bf16").reason()
    assert "7 units" in Plan(64, 4096, 4096, Form(), dataclasses.replace(config, units=7, split=2), "bf16").reason()


def test_too_few_steps_are_refused():
    assert "1 steps" in Plan(64, 256, 128, Form(), EVEN, "bf16").reason()
    assert "1 steps" in Plan(64, 256, 128, Form(), Config(64, 2, 2), "bf16").reason()
    assert Plan(64, 256, 128, Form(), Config(64, 2, 2, ahead=False), "bf16").reason() is None
    assert "tail of 2" in Plan(64, 256, 256, Form(), Config(64, 2, 2, split=2, tail=2, ahead=False), "bf16").reason()
    assert "tail" in Plan(64, 256, 1024, Form(), Config(64, 2, 2, split=2, share=2, tail=2), "bf16").reason()

"""Versions: checkpoints of one run, and a task whose images none of them has seen."""

import torch

from adaptlab.bench import testbeds
from adaptlab.bench.versions import PRETRAIN, pictures, turned_versions, versions

SHORT = {"steps": (5, 30), "width": 16}


def test_later_versions_read_better_and_another_run_is_another():
    first, second = versions(0, **SHORT)
    x, y = (t[PRETRAIN:] for t in pictures())
    assert testbeds.accuracy(second, (x, y)) > testbeds.accuracy(first, (x, y)) + 5
    other = versions(1, **SHORT)[-1]
    assert not torch.equal(next(other.parameters()), next(second.parameters()))


def test_parts_share_no_image_with_each_other_or_with_pre_training():
    bed = turned_versions(0, images=(30, 20), **SHORT)
    assert len(bed.model) == 3
    x, y = pictures(40.0, 0.2)
    rows = [torch.cdist(part[0].flatten(1), x.flatten(1)).argmin(1)
            for part in (bed.train, bed.choose, bed.test)]
    assert [len(r) for r in rows] == [30, 20, len(y) - PRETRAIN - 50]
    assert len(set(torch.cat(rows).tolist())) == len(y) - PRETRAIN
    assert torch.cat(rows).min() >= PRETRAIN
    assert torch.equal(bed.old[1], bed.test[1]) and not torch.equal(bed.old[0], bed.test[0])

"""Loaders with `state_dict`, as StatefulDataLoader of torchdata, and with their own generators."""

import pytest
import torch
from bad_input_helpers import binary, small
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pyro_vae as pv


class Stateful(DataLoader):
    """The protocol of StatefulDataLoader: the next iteration starts where the state says."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.at, self.begin = 0, 0

    def __iter__(self):
        start, self.begin = self.begin, 0
        for self.at, batch in enumerate(super().__iter__(), 1):
            if self.at > start:
                yield batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.begin = state["at"]


def plain(kind=DataLoader, **more):
    return kind(TensorDataset(binary(20)), batch_size=4, **more)


def own_generator():
    return Stateful(TensorDataset(binary(20)), batch_size=4, sampler=drawn())


def own_batches():
    return DataLoader(TensorDataset(binary(20)), batch_sampler=BatchSampler(drawn(), 4, False))


def drawn():
    return RandomSampler(range(20), generator=torch.Generator().manual_seed(1))


def advanced():
    loader = plain(Stateful)
    loader.load_state_dict({"at": 3})
    return loader


def fitted(rows, epochs, **more):
    torch.manual_seed(0)
    pair, options = small(), {"batch_size": 4, "engine": "eager", "progress": False}
    pv.fit(pair, rows, epochs=epochs, **options, **more)
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_with_state_trains_as_a_loader_and_resumes_exactly(shuffle, tmp_path):
    wanted = fitted(plain(shuffle=shuffle), 4)
    assert torch.equal(fitted(plain(Stateful, shuffle=shuffle), 4), wanted)
    fitted(plain(Stateful, shuffle=shuffle), 2, out=tmp_path / "run", checkpoint_seconds=0)
    again = fitted(plain(Stateful, shuffle=shuffle), 4, out=tmp_path / "run", resume=True)
    assert torch.equal(again, wanted)


def test_a_state_that_was_loaded_has_no_effect():
    assert torch.equal(fitted(advanced(), 2), fitted(plain(), 2))


@pytest.mark.parametrize("make", [own_generator, own_batches])
def test_a_generator_of_the_loader_is_told_when_a_run_is_resumed(make, tmp_path):
    wanted = fitted(make(), 3)
    assert torch.equal(fitted(make(), 3), wanted)
    fitted(make(), 2, out=tmp_path / "run", checkpoint_seconds=0)
    with pytest.warns(UserWarning, match="a generator of its own"):
        again = fitted(make(), 3, out=tmp_path / "run", resume=True)
    assert not torch.equal(again, wanted)


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_a_data_set_or_loader_without_a_generator_resumes_exactly_within_an_epoch(kind, tmp_path):
    class Stops(TensorDataset):
        reads, stop = 0, 0

        def __getitem__(self, i):
            Stops.reads += 1
            if Stops.reads == Stops.stop:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    def rows():
        data = Stops(binary(20))
        return data if kind == "data set" else DataLoader(data, batch_size=4, shuffle=True)

    wanted = fitted(rows(), 3)
    total, Stops.reads = Stops.reads, 0
    Stops.stop = total - 30  # in the second of three epochs
    with pytest.raises(KeyboardInterrupt):
        fitted(rows(), 3, out=tmp_path / "run", checkpoint_seconds=0)
    Stops.stop = 0
    assert torch.equal(fitted(rows(), 3, out=tmp_path / "run", resume=True), wanted)

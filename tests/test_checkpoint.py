"""Truth: the objects that were saved, and what lies in the folder."""

import resource

import pytest
import torch

from diffusers_ext.files import remove_partial
from diffusers_ext.training.checkpoint import list_checkpoints, load_checkpoint, same_state, save_checkpoint


def trained_optimizer(steps):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([[1.0, -2.0, 0.3]])).square().sum().backward()
        optimizer.step()


def test_an_optimizer_goes_on_where_it_stopped(tmp_path):
    model, optimizer = trained_optimizer(3)
    folder = save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    restored, other = trained_optimizer(1)
    state = load_checkpoint(folder)
    restored.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    advance(restored, other, 4)
    uninterrupted, _ = trained_optimizer(7)
    assert same_state(restored.state_dict(), uninterrupted.state_dict())


def test_values_keep_their_types(tmp_path):
    state = {"a": (1, 2.5, None), "b": [True, "x", {3: 1e-300}], "c": torch.tensor(3, dtype=torch.int64)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, state))
    assert same_state(loaded, state)
    assert isinstance(loaded["a"], tuple)
    assert not same_state(loaded, state | {"c": torch.tensor(4)})
    assert not same_state(loaded, state | {"c": torch.tensor(3.0)})


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    x = torch.arange(6.0)
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, {"x": x, "view": x[2:4], "t": x.reshape(2, 3).T}))
    assert torch.equal(loaded["view"], x[2:4])
    assert torch.equal(loaded["t"], x.reshape(2, 3).T)


def test_nothing_is_pickled(tmp_path):
    folder = save_checkpoint(tmp_path, 0, {"x": torch.ones(1)})
    assert sorted(f.name for f in folder.iterdir()) == ["state.json", "state.safetensors"]
    with pytest.raises(TypeError, match=r"cannot hold /f, of type function"):
        save_checkpoint(tmp_path, 1, {"f": len if False else (lambda: 0)})
    assert [f.name for f in tmp_path.iterdir()] == [folder.name]


def test_the_oldest_are_deleted_and_only_after_a_success(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, limit=2)
    assert [f.name for f in list_checkpoints(tmp_path)] == ["checkpoint-00000002", "checkpoint-00000010"]

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # what a write meets that finds no more space
    try:
        with pytest.raises(OSError, match=r"checkpoint-\d+: .*File too large"):
            save_checkpoint(tmp_path, 11, {"x": torch.zeros(10_000)}, limit=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000010"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1])["x"] == 10


def test_a_step_that_is_written_again_replaces_the_first(tmp_path):
    for value in (1, 2):
        save_checkpoint(tmp_path, 5, {"x": torch.tensor(value)}, limit=1)
    assert load_checkpoint(tmp_path / "checkpoint-00000005")["x"] == 2
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-00000005"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"x": torch.ones(100)})
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OSError, match="checkpoint-00000001 is damaged"):
        load_checkpoint(folder)


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.tensor(1)})
    (tmp_path / ".partial-checkpoint-00000002").mkdir()
    (tmp_path / ".partial-checkpoint-00000002" / "state.json").write_text("{")
    (tmp_path / "checkpoint-00000003").mkdir()
    assert [f.name for f in list_checkpoints(tmp_path)] == ["checkpoint-00000001"]
    remove_partial(tmp_path)
    assert not list(tmp_path.glob(".partial*"))


def test_so_many_are_kept(tmp_path):
    for step in range(6):
        save_checkpoint(tmp_path, step, {"step": step}, limit=4)
        assert len(list_checkpoints(tmp_path)) == min(step + 1, 4)
    assert [f.name for f in list_checkpoints(tmp_path)] == [f"checkpoint-{s:08d}" for s in (2, 3, 4, 5)]


def test_the_newest_is_never_pruned_nor_a_later_one(tmp_path):
    for step in (100, 200, 300, 7):
        save_checkpoint(tmp_path, step, {"step": step}, limit=2)
    assert [f.name for f in list_checkpoints(tmp_path)] == [f"checkpoint-{s:08d}" for s in (7, 200, 300)]
    for step in (8, 9):
        save_checkpoint(tmp_path, step, {"step": step}, limit=1)
    assert [f.name for f in list_checkpoints(tmp_path)] == [f"checkpoint-{s:08d}" for s in (9, 200, 300)]


@pytest.mark.parametrize("text", ["", "[", '{"dict": 3}', '{"tensor": "y"}', '{"dict": [[1]]}', "{}", "[" * 100_000])
def test_a_damaged_file_is_an_os_error_that_names_the_folder(tmp_path, text):
    folder = save_checkpoint(tmp_path, 1, {"x": torch.ones(1)})
    (folder / "state.json").write_text(text)
    with pytest.raises(OSError, match=f"{folder} is damaged"):
        load_checkpoint(folder)

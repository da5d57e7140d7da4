"""What replaces files: complete, or as before, whatever fails and wherever a process is killed."""

import pytest
from safetensors import SafetensorError

from diffusers_ext.files import remove_partial, replacing, replacing_entries, replacing_folder


@pytest.mark.parametrize("context", [replacing, replacing_folder, replacing_entries])
def test_a_full_disk_is_an_os_error_and_changes_nothing(tmp_path, context):
    """safetensors has an error of its own for a write that fails."""
    target = tmp_path / "pipeline"
    if context is replacing:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "weights").write_text("old")
    with pytest.raises(OSError, match="No space left on device"), context(target):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert (target if context is replacing else target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_what_a_kill_has_left_of_a_save_is_cleaned_and_nothing_is_lost(tmp_path):
    """Killed after `unet` was moved aside and before the new one came; `vae` had been replaced."""
    aside = tmp_path / ".saving-1a2b"
    for folder in (aside / "old-unet", aside / "unet", aside / "old-vae", tmp_path / "vae"):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(folder.name)
    (tmp_path / "mine.txt").write_text("mine")
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "unet", "vae"]
    assert (tmp_path / "unet" / "weights").read_text() == "old-unet"
    assert (tmp_path / "vae" / "weights").read_text() == "vae"

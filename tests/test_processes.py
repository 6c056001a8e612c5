"""What processes ask of the machine."""

from pathlib import Path

from thunderhead import processes


def test_free_memory_is_what_the_tightest_control_group_leaves(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    groups = {"": None, "outer": (1000, 400, 50), "outer/inner": (2000, 100, 0), "other": (10, 0, 0)}
    for name, values in groups.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        limit, used, cached = values or ("max", 5, 0)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")
    own.write_text("4:memory:/elsewhere\n0::/outer/inner\n")
    assert sorted(processes._control_group_memory(root, own)) == [650, 1900]
    own.write_text("4:memory:/elsewhere\n")
    assert processes._control_group_memory(root, own) == []
    assert 0 < processes.free_host_memory() < 2**50

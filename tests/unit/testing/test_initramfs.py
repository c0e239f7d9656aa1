"""The archive a guest boots from: its format, and what goes into it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vhostblk.testing.initramfs import (
    CpioArchive,
    GuestKernel,
    MissingToolError,
    build_initramfs,
    shared_libraries,
)
from vhostblk.testing.requirements import require


def fake_kernel(root: Path, release: str, dependencies: str = "", built_in: str = "") -> Path:
    (root / "boot").mkdir(exist_ok=True)
    (root / "boot" / f"vmlinuz-{release}").write_bytes(b"kernel")
    modules = root / "lib" / "modules" / release
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text(dependencies)
    (modules / "modules.builtin").write_text(built_in)
    return modules


def test_archive_is_read_back_by_cpio(tmp_path: Path) -> None:
    require("cpio")
    archive = CpioArchive()
    archive.add_file("etc/deep/odd", b"123", mode=0o600)
    archive.add_file("even", b"1234", mode=0o755)
    archive.add_symlink("link", "even")
    archive.add_directory("empty")
    subprocess.run(
        ["cpio", "-idm", "--quiet"], input=archive.to_bytes(), cwd=tmp_path, check=True, timeout=20
    )
    assert (tmp_path / "etc/deep/odd").read_bytes() == b"123"
    assert (tmp_path / "etc/deep/odd").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").read_bytes() == b"1234"
    assert (tmp_path / "empty").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "etc", "even", "link"]


def test_archive_makes_each_parent_folder_once_and_before_its_files() -> None:
    archive = CpioArchive()
    archive.add_file("a/b/one", b"")
    archive.add_file("a/b/two", b"")
    data = archive.to_bytes()
    assert data.count(b"a/b\0") == 1
    assert data.index(b"a\0") < data.index(b"a/b\0") < data.index(b"a/b/one\0")


def test_archive_aligns_every_member_to_four_bytes() -> None:
    for length in range(5):
        archive = CpioArchive()
        archive.add_file("f" * (length + 1), bytes(length))
        archive.add_file("g", b"")
        data = archive.to_bytes()
        assert len(data) % 4 == 0
        assert data.index(b"070701", 1) % 4 == 0


def test_archive_refuses_a_file_twice() -> None:
    archive = CpioArchive()
    archive.add_file("a", b"")
    with pytest.raises(ValueError, match="a is in the archive already"):
        archive.add_file("a", b"other")


def test_newest_kernel_is_the_cloud_kernel_with_the_highest_numbers(tmp_path: Path) -> None:
    for release in ("6.1.0-9-cloud-amd64", "6.1.0-30-cloud-amd64", "6.12.1-amd64"):
        fake_kernel(tmp_path, release)
    assert GuestKernel.newest((tmp_path,)).release == "6.1.0-30-cloud-amd64"


def test_kernel_without_its_modules_is_passed_over(tmp_path: Path) -> None:
    fake_kernel(tmp_path, "6.1.0-30-cloud-amd64")
    (tmp_path / "boot" / "vmlinuz-6.1.0-40-cloud-amd64").write_bytes(b"kernel")
    assert GuestKernel.newest((tmp_path,)).release == "6.1.0-30-cloud-amd64"


def test_no_kernel_is_a_missing_tool(tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match="no Linux kernel with its modules below"):
        GuestKernel.newest((tmp_path,))


def test_modules_come_after_what_they_need_and_only_once(tmp_path: Path) -> None:
    modules = fake_kernel(
        tmp_path,
        "6.1",
        "kernel/v/virtio_pci.ko: kernel/v/virtio.ko kernel/v/virtio_ring.ko\n"
        "kernel/v/virtio.ko: kernel/v/virtio_ring.ko\n"
        "kernel/v/virtio_ring.ko:\n"
        "kernel/v/virtio-blk.ko: kernel/v/virtio.ko kernel/v/virtio_ring.ko\n",
        "kernel/fs/ext4/ext4.ko\n",
    )
    kernel = GuestKernel.newest((tmp_path,))
    names = [path.name for path in kernel.module_paths(("virtio_pci", "ext4", "virtio_blk"))]
    assert names == ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "virtio-blk.ko"]
    assert kernel.module_paths(("virtio_ring",)) == [modules / "kernel/v/virtio_ring.ko"]


def test_unknown_module_is_named(tmp_path: Path) -> None:
    fake_kernel(tmp_path, "6.1")
    with pytest.raises(MissingToolError, match="has no module virtio_gone"):
        GuestKernel.newest((tmp_path,)).module_paths(("virtio_gone",))


def test_program_comes_with_its_libraries_and_loader(tmp_path: Path) -> None:
    require("busybox", "mkfs.ext4")
    fake_kernel(tmp_path, "6.1")
    kernel = GuestKernel.newest((tmp_path,))
    data = build_initramfs(kernel, "#!/bin/sh\n", modules=(), programs=("mkfs.ext4",))
    for name in (b"bin/mkfs.ext4\0", b"libext2fs.so.2\0", b"ld-linux-x86-64.so.2\0", b"init\0"):
        assert name in data


def test_unknown_program_is_named(tmp_path: Path) -> None:
    require("busybox")
    fake_kernel(tmp_path, "6.1")
    kernel = GuestKernel.newest((tmp_path,))
    with pytest.raises(MissingToolError, match="no-such-program is not installed"):
        build_initramfs(kernel, "", modules=(), programs=("no-such-program",))


def test_static_program_has_no_libraries() -> None:
    require("busybox")
    assert shared_libraries(Path("/bin/busybox")) == []
    assert shared_libraries(Path("/bin/sh"))

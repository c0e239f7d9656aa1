"""create, info, resize, snapshot, measure and amend: what they say and leave, with nothing to compare it with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.unit.cli.img.conftest import Img

MIB = 1 << 20


def test_a_new_image_is_announced_with_all_that_it_is_like(img: Img) -> None:
    said = img("create -f qcow2 -o lazy_refcounts=on,compat=v3 new 1000k")
    assert said == (
        0,
        "Formatting 'new', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1024000 compat=v3 "
        "lazy_refcounts=on refcount_bits=16\n",
        "",
    )
    assert json.loads(img("info --output=json new").out)["format-specific"]["data"] == {
        "compat": "1.1",
        "compression-type": "zlib",
        "lazy-refcounts": True,
        "refcount-bits": 16,
        "corrupt": False,
        "extended-l2": False,
    }


def test_quiet_says_nothing(img: Img) -> None:
    assert img("create -q new 1M") == (0, "", "")
    assert img("resize -q -f raw new 2M") == (0, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("new", "Image creation needs a size parameter"),
        ("-o size=1M new 1M", "The image size must be specified only once"),
        ("-f nosuch new 1M", "Unknown file format 'nosuch'"),
        ("-f vmdk new 1M", "Format driver 'vmdk' does not support image creation"),
        ("-b base new", "Backing file not supported for file format 'raw'"),
        ("-F raw new", "Backing file format not supported for file format 'raw'"),
        ("-f qcow2 -b new new 1M", "Error: Trying to create an image with the same filename as"),
        ("-f qcow2 -b '' new 1M", "Expected backing file name, got empty string"),
        ("-f qcow2 -u -b x new 1M", "Backing file specified without backing format"),
        ("-f qcow2 -b x -F raw new", "Could not open 'x': No such file or directory\nCould not"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(img: Img, words: str, message: str) -> None:
    said = img(f"create {words}")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith(f"img: new: {message}")
    assert os.listdir() == []


def test_found_format_is_told_in_a_line_that_does_not_end(img: Img) -> None:
    Path("base").write_bytes(bytes(MIB))
    assert img("create -f qcow2 -b base new").err == (
        "img: new: Backing file specified without backing format\nDetected format of raw."
    )


@pytest.mark.parametrize(
    ("text", "words"), [("''", "new 1M"), (",a", "new 1M"), ("a,", "new 1M"), ("a,,,", "new 1M")]
)
def test_lists_that_cannot_be_joined(img: Img, text: str, words: str) -> None:
    assert (
        img(f"create -o {text} {words}").err == f"img: Invalid option list: {text.strip(chr(39))}\n"
    )


def test_info_shows_the_chain_and_finds_loops(img: Img) -> None:
    assert img("create -q -f qcow2 base 1M").status == 0
    assert img("create -q -f qcow2 -b base -F qcow2 top").status == 0
    chain = json.loads(img("info --backing-chain --output=json top").out)
    assert [one["filename"] for one in chain] == ["top", "base"]
    assert img("info --backing-chain top").out.count("\n\nimage: base\n") == 1
    for name, backing in ("one", "two"), ("two", "one"):
        assert img(f"create -q -u -f qcow2 -b {backing} -F qcow2 {name} 1M").status == 0
    assert img("info --backing-chain one").err == (
        "img: Backing file 'one' creates an infinite loop.\n"
    )


@pytest.mark.parametrize(
    ("words", "length"),
    [("new 2M", 2 * MIB), ("new +1M", 2 * MIB), ("--shrink new -512k", MIB // 2)],
)
def test_sizes_may_be_relative(img: Img, words: str, length: int) -> None:
    assert img("create -q new 1M").status == 0
    assert img(f"resize -f raw {words}") == (0, "Image resized.\n", "")
    assert os.stat("new").st_size == length


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("new", "Not enough arguments"),
        ("-f raw a b 1M", "Expecting image file name and size"),
        ("-f raw new -2M", "New image size must be positive"),
        ("-f raw new x", "Parameter 'size' expects a non-negative number below 2^64"),
        ("--preallocation=x new 2M", "Invalid preallocation mode 'x'"),
        (
            "-f raw --preallocation=full new 1M",
            "Preallocation can only be used for growing images",
        ),
        ("-f raw new -1", "Use the --shrink option to perform a shrink operation."),
    ],
)
def test_what_cannot_be_resized_stays_as_it_is(img: Img, words: str, message: str) -> None:
    assert img("create -q new 1M").status == 0
    said = img(f"resize {words}")
    assert (said.status, said.out) == (1, "")
    assert said.err.startswith(f"img: {message}\n")
    assert os.stat("new").st_size == MIB


def test_snapshots_are_made_listed_applied_and_deleted(img: Img) -> None:
    assert img("create -q -f qcow2 new 1M").status == 0
    assert img("snapshot -l new") == (0, "", "")
    assert img("snapshot -c one new") == (0, "", "")
    header, columns, one = img("snapshot -l new").out.splitlines()
    assert (header, columns.split()[0], one.split()[:4]) == (
        "Snapshot list:",
        "ID",
        ["1", "one", "0", "B"],
    )
    assert img("snapshot -a 1 new") == (0, "", "")
    assert img("snapshot -d 1 new") == (
        1,
        "",
        "img: Could not delete snapshot '1': snapshot not found\n",
    )
    assert img("snapshot -d one new") == (0, "", "")
    assert img("snapshot -a one new").err == (
        "img: Could not apply snapshot 'one': Failed to load snapshot: No such file or directory\n"
    )


def test_actions_on_snapshots_do_not_mix_whatever_follows(img: Img) -> None:
    assert img("snapshot -l -c x -Z").err.startswith("img: Cannot mix '-l', '-a', '-c', '-d'\n")


def test_raw_images_keep_no_snapshots(img: Img) -> None:
    assert img("create -q new 1M").status == 0
    options = "--image-opts driver=raw,file.filename=new"
    assert img(f"snapshot -c x {options}").err == (
        "img: Could not create snapshot 'x': -95 (Operation not supported)\n"
    )
    assert img(f"snapshot -a x {options}").err == (
        "img: Could not apply snapshot 'x': Block driver does not support snapshots\n"
    )


def test_sizes_are_measured(img: Img) -> None:
    assert img("measure --size 1M").out == "required size: 1048576\nfully allocated size: 1048576\n"
    assert json.loads(img("measure --output json -O qcow2 --size 1G").out) == {
        "required": 393216,
        "fully-allocated": 1074135040,
    }
    assert img("create -q -f qcow2 new 1M").status == 0
    assert "bitmaps size: 0\n" in img("measure -O qcow2 new").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Either --size N or one filename must be specified."),
        ("a b", "At most one filename argument is allowed."),
        ("--size 1M a", "--size N cannot be used together with a filename."),
        ("-l x", "--image-opts, -f, and -l require a filename argument."),
        ("--output xml", "--output must be used with human or json as argument."),
        ("--size 1M -O nosuch", "Unknown file format 'nosuch'"),
        ("--size 1M -O file", "Block driver 'file' does not support size measurement"),
        ("--size 1M -o a=1", "Invalid parameter 'a'\nimg: Invalid options for file format 'raw'"),
        (
            "-l snapshot.x=1 a",
            "Invalid parameter 'snapshot.x'\nimg: Failed in parsing snapshot param 'snapshot.x=1'",
        ),
    ],
)
def test_what_cannot_be_measured(img: Img, words: str, message: str) -> None:
    assert img(f"measure {words}") == (1, "", f"img: {message}\n")


def test_measure_leaves_it_to_getopt_to_complain(img: Img) -> None:
    said = img("measure --size")
    assert (said.status, said.err) == (0, "measure: option '--size' requires an argument\n")
    assert said.out.startswith("usage: img ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("new", "Must specify options (-o)\nTry 'img --help' for more information"),
        ("-o size=1M", "Expecting one image file name"),
        ("-t x -o size=1M new", "Invalid cache option: x"),
        ("-o x=1 new", "Invalid parameter 'x'"),
        (
            "-o cluster_size=4k new",
            "Invalid parameter 'cluster_size'\nThis option is only supported for image creation",
        ),
        ("-o compat=9 new", "Unknown compatibility level 9"),
        (
            "-o backing_file=x new",
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        ),
        ("-f raw -o help", "Format driver 'raw' does not support option amendment"),
    ],
)
def test_what_cannot_be_amended(img: Img, words: str, message: str) -> None:
    assert img("create -q -f qcow2 new 1M").status == 0
    assert img(f"amend {words}") == (1, "", f"img: {message}\n")


def test_changes_show_how_far_they_are(img: Img) -> None:
    assert img("create -q -f qcow2 new 1M").status == 0
    assert img("amend -p -o lazy_refcounts=on new") == (
        0,
        "    (0.00/100%)\r    (100.00/100%)\r\n",
        "",
    )
    assert "lazy refcounts: true" in img("info new").out

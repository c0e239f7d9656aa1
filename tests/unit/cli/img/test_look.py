"""check, map, compare and bitmap: what they say and how they end, with nothing to compare it with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.img.conftest import Img

KIB = 1 << 10


def refcount(path: str, cluster: int, count: int) -> None:
    """Change what a new image says of a cluster: its first block of counts is its third cluster."""
    with Path(path).open("r+b") as file:
        file.seek(2 * 64 * KIB + 2 * cluster)
        file.write(count.to_bytes(2))


def test_whole_image_has_nothing_to_be_told_of_but_its_end(img: Img) -> None:
    img("create -q -f qcow2 new 1M")
    said = img("check new")
    assert said == (
        0,
        "No errors were found on the image.\nImage end offset: 262144\n",
        "",
    )
    assert img("check -q new") == (0, "", "")


def test_exit_codes_of_a_check_say_what_was_found(img: Img) -> None:
    img("create -q -f qcow2 new 1M")
    img("create -q plain 1M")
    refcount("new", 1, 2)
    said = img("check new")
    assert (said.status, said.err) == (3, "Leaked cluster 1 refcount=2 reference=1\n")
    refcount("new", 1, 0)
    said = img("check new")
    assert (said.status, said.err) == (2, "ERROR cluster 1 refcount=0 reference=1\n")
    assert img("check plain").status == 63
    assert img("check nowhere").status == 1


def test_repaired_image_is_checked_again(img: Img) -> None:
    img("create -q -f qcow2 new 1M")
    refcount("new", 1, 2)
    said = img("check -r leaks new")
    assert said == (
        0,
        "The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n    0 corruptions\n\n"
        "Double checking the fixed image now...\nNo errors were found on the image.\nImage end offset: 262144\n",
        "Leaked cluster 1 refcount=2 reference=1\nRepairing cluster 1 refcount=2 reference=1\n",
    )
    assert img("check new").status == 0


def test_only_a_repair_of_all_writes_missing_counts_anew(img: Img) -> None:
    img("create -q -f qcow2 new 1M")
    refcount("new", 1, 0)
    before = Path("new").read_bytes()
    said = img("check -r leaks new")
    assert (said.status, said.out) == (1, "")
    assert said.err.endswith(
        "ERROR need to rebuild refcount structures\nimg: Check failed: Input/output error\n"
    )
    assert Path("new").read_bytes() == before
    said = img("check -r all --output=json new")
    assert said.status == 0
    assert "Rebuilding refcount structure\n" in said.err
    assert json.loads(said.out)["corruptions-fixed"] == 1


@pytest.mark.parametrize("words", ["check -r some new", "check", "map", "compare new", "map a b"])
def test_words_that_make_no_sense_say_where_to_find_help(img: Img, words: str) -> None:
    said = img(words)
    assert (said.status, said.out) == (1, "")
    assert said.err.endswith("--help' for more information\n")


# ---------------------------------------------------------------------- map


def test_map_has_each_range_with_its_layer_and_its_place(img: Img) -> None:
    Path("base").write_bytes(b"\1" * 128 * KIB)
    img("create -q -f qcow2 -b base -F raw top 256k")
    assert json.loads(img("map --output=json top").out) == [
        {
            "start": 0,
            "length": 128 * KIB,
            "depth": 1,
            "present": True,
            "zero": False,
            "data": True,
            "offset": 0,
        },
        {
            "start": 128 * KIB,
            "length": 128 * KIB,
            "depth": 0,
            "present": False,
            "zero": True,
            "data": False,
        },
    ]
    assert img("map top").out.splitlines() == [
        "Offset          Length          Mapped to       File",
        "0               0x20000         0               base",
    ]
    assert json.loads(img("map --output=json -s 64k -l 4k top").out)[0]["length"] == 4 * KIB


def test_map_for_people_refuses_what_has_no_place(img: Img) -> None:
    Path("plain").write_bytes(b"\1" * 64 * KIB)
    img("convert -c -O qcow2 plain packed")
    said = img("map packed")
    assert said.status == 1
    assert said.err == "img: File contains external, encrypted or compressed clusters.\n"
    assert json.loads(img("map --output=json packed").out)[0]["data"] is True


# ---------------------------------------------------------------------- compare


def test_compare_says_where_the_first_difference_is(img: Img) -> None:
    content = bytearray(b"\1" * 8192 * KIB)
    Path("one").write_bytes(content)
    content[5000 * KIB + 700] = 2
    content[7000 * KIB] = 2
    Path("other").write_bytes(content)
    assert img("compare one other") == (
        1,
        f"Content mismatch at offset {5000 * KIB + 512}!\n",
        "",
    )
    assert img("compare one one") == (0, "Images are identical.\n", "")
    assert img("compare -q one other") == (1, "", "")


def test_compare_takes_a_shorter_image_for_one_that_goes_on_as_zeroes(img: Img) -> None:
    Path("one").write_bytes(b"\1" * 4 * KIB)
    Path("same").write_bytes(b"\1" * 4 * KIB + bytes(4 * KIB))
    Path("other").write_bytes(b"\1" * 4 * KIB + bytes(3 * KIB) + b"\1" * KIB)
    warning = "Warning: Image size mismatch!\n"
    assert img("compare one same").out == f"{warning}Images are identical.\n"
    assert img("compare other one").out == f"{warning}Content mismatch at offset {7 * KIB}!\n"
    said = img("compare -s one same")
    assert (said.status, said.out) == (1, "Strict mode: Image size mismatch!\n")


def test_compare_that_fails_ends_with_a_code_of_its_own(img: Img) -> None:
    Path("one").write_bytes(b"\1" * 4 * KIB)
    assert img("compare one nowhere").status == 2
    broken = "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype={},image.driver=file,image.filename=one"
    plain = "driver=file,filename=one"
    said = img(f"compare --image-opts {plain} {broken.format('read')}")
    assert (said.status, said.err) == (
        4,
        f"img: Error while reading offset 0 of {broken.format('read')}: Input/output error\n",
    )
    said = img(f"compare --image-opts {plain} {broken.format('block-status')}")
    assert said.status == 3
    assert said.err.startswith("img: Sector allocation test failed for driver=blkdebug")


# ---------------------------------------------------------------------- bitmap


def test_actions_on_a_bitmap_are_done_in_order(img: Img) -> None:
    img("create -q -f qcow2 new 1M")
    assert img("bitmap --add --disable -g 32k new b0") == (0, "", "")
    bitmaps = json.loads(img("info --output=json new").out)["format-specific"]["data"]["bitmaps"]
    assert bitmaps == [{"name": "b0", "granularity": 32 * KIB, "flags": []}]
    said = img("bitmap --enable --add new b0")
    assert said.err == "img: Operation add on bitmap b0 failed: Bitmap already exists: b0\n"
    # What was done before the action that failed stays done.
    bitmaps = json.loads(img("info --output=json new").out)["format-specific"]["data"]["bitmaps"]
    assert bitmaps[0]["flags"] == ["auto"]
    assert img("bitmap --remove new b0").status == 0
    assert "bitmaps" not in img("info --output=json new").out


def test_bitmap_needs_no_backing_file(img: Img) -> None:
    img("create -q -f qcow2 -u -b nowhere -F raw new 1M")
    assert img("bitmap --add new b0") == (0, "", "")


def test_bitmap_of_another_image_is_merged(img: Img) -> None:
    img("create -q -f qcow2 one 1M")
    img("create -q -f qcow2 two 1M")
    img("create -q -f qcow2 large 2M")
    for name in ("one", "two", "large"):
        img(f"bitmap --add {name} b0")
    assert img("bitmap --merge b0 -b two -F qcow2 one b0") == (0, "", "")
    said = img("bitmap --merge b0 -b large -F qcow2 one b0")
    assert "different sizes (destination size is 1048576, source size is 2097152)" in said.err
    assert img("bitmap --merge b0 -b nowhere one b0").status == 1

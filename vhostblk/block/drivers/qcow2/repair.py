"""Repairs an image after a survey, in an order in which a crash makes nothing worse.

Theory of operation: counts that are too low can lose data, those that are too high only room. So

1. places that nobody needs and that cannot be right are dropped, each by one small write;
2. counts that are too low are raised; a flush. Where that is not possible, because there is no count, or what has it
   is damaged, all counts are written anew, to clusters that nobody uses, and after a flush the header is changed to
   name them. The old ones are whole until then, and leaked afterwards;
3. flags of clusters that may be written in place are made to agree with what the counts are going to be; a flush;
4. counts that are too high are lowered; a flush; what is free now goes back to the host;
5. the table of snapshots is written anew, if it was not what it should be (`snapshot_repair.py`);
6. if nothing is wrong any more, the header is cleared of what said so.

Whenever it is interrupted, what the disk shows is the same, nothing that is referred to is counted as free that was not
before, and the next repair finishes it.

Context: the control loop; nobody uses the image meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import replace

from vhostblk.block.check import CheckResult
from vhostblk.block.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import (
    SUBCLUSTERS,
    Header,
    Incompatible,
)
from vhostblk.block.drivers.qcow2.l2_table import L2Table
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.rebuild import write_new_counts
from vhostblk.block.drivers.qcow2.recorded import difference
from vhostblk.block.drivers.qcow2.snapshot_repair import SnapshotRepair
from vhostblk.block.drivers.qcow2.snapshots import SnapshotTable
from vhostblk.block.drivers.qcow2.survey import MOST_BYTES, Survey
from vhostblk.block.drivers.qcow2.tables import OFFSETS, read_table
from vhostblk.block.drivers.qcow2.tally import PIECE, Tally, differences
from vhostblk.block.edge import Edge
from vhostblk.block.flags import CheckMode
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ImageError

_ZERO = 1
_ALL = (1 << SUBCLUSTERS) - 1
_ALL_ZERO = _ALL << SUBCLUSTERS
_PIECE = 1 << 20
_MARKS = Incompatible.DIRTY | Incompatible.CORRUPT
# Runs of clusters to give back at a time.
_MOST_RUNS = 1 << 16
# Counts to remember before they are written.
_AT_ONCE = 1 << 16


async def check_image(
    file: Edge,
    header: Header,
    fix: CheckMode,
    result: CheckResult,
    *,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Look through an image, and repair it.

    Args:
        file: the image's; nobody else uses it.
        fix: nothing; or leaks, or errors, or both.
        result: is told what is found.
        most_bytes: for counts.
    """
    work = _Repair(file, header, fix, result, most_bytes)
    try:
        await work.run()
    except (BlockError, ImageError) as error:
        result.check_errors += 1
        result.failure = error.errno or errno.EIO if isinstance(error, BlockError) else errno.EIO
        result.say(f"ERROR {error}")
        result.corruptions += work.not_dropped


class _Repair:
    """One repair, or a check only.

    Attributes: not_dropped: entries whose place is wrong still.
    """

    def __init__(
        self, file: Edge, header: Header, fix: CheckMode, result: CheckResult, most_bytes: int
    ) -> None:
        self._file = file
        self._header = header
        self._leaks = bool(fix & CheckMode.FIX_LEAKS)
        self._errors = bool(fix & CheckMode.FIX_ERRORS)
        self._fix = fix
        self._result = result
        self._most_bytes = most_bytes
        self._survey = self._new_survey(header, result)
        self.not_dropped = 0
        self._places = TablePlaces(header.cluster_bits)
        self._snapshots = SnapshotTable()

    def _new_survey(self, header: Header, result: CheckResult) -> Survey:
        return Survey(self._file, header, result, fixes=self._errors, most_bytes=self._most_bytes)

    async def run(self) -> None:
        """All of it.

        Raises:
            BlockError: the child's errno.
            ImageError: why nothing, or nothing more, can be done.
        """
        table = SnapshotRepair(self._file, self._header, self._result, fixes=self._errors)
        loaded = await table.load()
        if loaded is None:
            return
        self._snapshots = loaded
        if table.header != self._header:
            self._header = table.header
            self._survey = self._new_survey(self._header, self._result)
        try:
            await self._check_counts()
        finally:
            table.count_wrong()
        if table.is_wrong and self._errors:
            try:
                self._header = await table.write(self._header, await self._places_of_tables())
            except (BlockError, ImageError) as error:
                raise ImageError(f"failed to update snapshot table: {error}") from None
        if self._fix and self._result.is_clean_but_for_leaks:
            await self._clear_marks()

    async def _check_counts(self) -> None:
        """How often clusters are used, and who may write in place."""
        result, survey = self._result, self._survey
        await survey.count(self._snapshots)
        self.not_dropped = len(survey.misaligned)
        await survey.compare()
        if not self._fix:
            await self._check_flags(survey.recorded.tally, repair=False)
            return
        if result.check_errors and not survey.must_rebuild:
            raise ImageError("What could not be read is not repaired")
        if survey.is_cut:
            # Unlike in QEMU: what was not counted must not be taken for free.
            raise ImageError("What ends behind the end of the file is not repaired")
        if survey.must_rebuild and not self._errors:
            raise ImageError("need to rebuild refcount structures")
        await self._drop_misaligned()
        if survey.must_rebuild:
            survey = await self._rebuild()
        else:
            self._announce(survey)
        final = await self._write_counts(survey, raises=True)
        await self._check_flags(final, repair=self._may_repair_flags())
        if self._leaks:
            await self._write_counts(survey, raises=False)
        result.image_end_offset = final.end() * self._header.cluster_size

    # ------------------------------------------------------------------ entries

    async def _drop_misaligned(self) -> None:
        """Clusters of zeroes go on being zeroes, without a place."""
        misaligned = self._survey.misaligned
        if not misaligned:
            return
        places = await self._places_of_tables()
        size = self._header.l2_entry_size
        for table, index, bitmap in misaligned:
            at = table + index * size
            places.check("Preventing invalid write", at, size)
            if self._header.has_subclusters:
                entry = bytes(8) + ((bitmap | bitmap << SUBCLUSTERS) & _ALL_ZERO).to_bytes(8)
            else:
                entry = _ZERO.to_bytes(8)
            await self._write(at, entry)
            self.not_dropped -= 1
            self._result.corruptions_fixed += 1
        await self._file.flush()

    async def _places_of_tables(self, *, with_l1: bool = True) -> TablePlaces:
        """Where an L2 table cannot be, whatever an L1 table says; or, without it, the L1 table."""
        header, size = self._header, self._header.cluster_size
        places = TablePlaces(header.cluster_bits)
        ranges = [(0, size)]
        if with_l1:
            ranges += [(header.l1_offset, header.l1_entries * 8)]
        ranges += [(header.refcount_table_offset, header.refcount_table_clusters * size)]
        ranges += self._snapshots.places(size)
        ranges += [(entry, size) for entry in self._survey.recorded.table if entry]
        places.add_all(at for start, length in ranges for at in range(start, start + length, size))
        return places

    def _announce(self, survey: Survey) -> None:
        """Say which counts are going to be changed, and which are not."""
        for number in sorted({*survey.used.pieces(), *survey.recorded.tally.pieces()}):
            recorded, used = survey.recorded.tally.piece(number), survey.used.piece(number)
            if recorded == used:
                continue
            for at, count, uses in differences(recorded, used):
                if self._errors if count < uses else self._leaks:
                    word = "Repairing"
                else:
                    word = "ERROR" if count < uses else "Leaked"
                self._result.say(difference(word, number * PIECE + at, count, uses))

    # ------------------------------------------------------------------ flags

    def _may_repair_flags(self) -> bool:
        """If only leaks are to be repaired, then only those that follow from that."""
        result = self._result
        return self._errors or not (result.check_errors or result.corruptions)

    async def _check_flags(self, counts: Tally, *, repair: bool) -> None:
        """Whether what may be written in place is what nobody else uses, in the active tables."""
        header = self._header
        if repair:
            others = await self._places_of_tables(with_l1=False)
            others.check("Preventing invalid write", header.l1_offset, header.l1_entries * 8)
            self._places = await self._places_of_tables()
        l1_wrong = await self._check_l1_flags(counts, repair=repair)
        fixed = len(l1_wrong)
        l1_tables = [(header.l1_offset, header.l1_entries, True)]
        async for l2_table in self._survey.l2_tables(l1_tables, said_before=l1_wrong):
            fixed += await self._check_l2_flags(l2_table, counts, repair=repair)
        if repair and fixed:
            await self._file.flush()
            self._result.corruptions -= fixed
            self._result.corruptions_fixed += fixed

    async def _check_l1_flags(self, counts: Tally, *, repair: bool) -> dict[int, str]:
        """The same in the L1 table. Returns what there is to say, by number of the entry."""
        header, found = self._header, dict[int, str]()
        word = "Repairing" if repair else "ERROR"
        for at in range(0, header.l1_entries * 8, _PIECE):
            length = min(_PIECE, header.l1_entries * 8 - at)
            table = await read_table(self._file, header.l1_offset + at, length // 8)
            before = len(found)
            for index, entry in enumerate(table):
                offset = entry & OFFSET_MASK
                uses = await self._count_of(counts, offset) if offset else None
                if uses is not None and (uses == 1) != bool(entry & COPIED):
                    found[at // 8 + index] = (
                        f"{word} OFLAG_COPIED L2 cluster: l1_index={at // 8 + index} l1_entry={entry:x}"
                        f" refcount={uses}"
                    )
                    table[index] ^= COPIED
            if repair and len(found) > before:
                await self._write(header.l1_offset + at, OFFSETS.encode(table))
        self._result.corruptions += len(found)
        return found

    async def _check_l2_flags(self, table: L2Table, counts: Tally, *, repair: bool) -> int:
        """The same in one L2 table. Returns how many are repaired."""
        survey, size = self._survey, self._header.cluster_size
        if survey.entries.is_scattered(table) and self._flags_are_right(table, counts):
            return 0
        wrong: list[tuple[int, int]] = []
        for index, count, entry, _ in survey.entries.runs(table):
            if entry & COMPRESSED or not survey.entries.has_place(entry):
                continue
            is_copied = bool(entry & COPIED)
            if self._header.has_data_file:
                wrong += ((index + at, 1) for at in range(count) if not is_copied)
                continue
            offset = entry & OFFSET_MASK
            if is_copied and self._all_are_one(counts, offset // size, count):
                continue
            for at in range(count):
                uses = await self._count_of(counts, offset + at * size)
                if uses is not None and (uses == 1) != is_copied:
                    wrong.append((index + at, uses))
        if not wrong:
            return 0
        for index, uses in wrong:
            what = f"OFLAG_COPIED data cluster: l2_entry={table.entries[index]:x} refcount={uses}"
            if repair:
                # Only once, also if the table is used several times.
                self._result.corruptions += 1
                self._result.say(f"Repairing {what}")
            else:
                survey.wrong(f"ERROR {what}", table.active)
        if repair:
            for index, _ in wrong:
                table.entries[index] ^= COPIED
            first, last = wrong[0][0], wrong[-1][0] + 1
            at = table.offset + first * self._header.l2_entry_size
            entries = table.to_bytes(first, last)
            # It may be no L2 table at all.
            self._places.check("Preventing invalid write", at, len(entries))
            await self._write(at, entries)
        return len(wrong)

    def _flags_are_right(self, table: L2Table, counts: Tally) -> bool:
        """Whether that is so for certain: each cluster is the active table's alone, and says so."""
        survey, bits = self._survey, self._header.cluster_bits
        entries = [
            entry for entry in table.entries if entry & OFFSET_MASK and not entry & COMPRESSED
        ]
        clusters = [(entry & OFFSET_MASK) >> bits for entry in entries]
        return (
            all(entry & COPIED for entry in entries)
            and max(clusters, default=-1) < survey.clusters
            and all(
                survey.recorded.is_known(block * survey.recorded.per_block)
                for block in {cluster // survey.recorded.per_block for cluster in clusters}
            )
            and counts.each_is_one(clusters)
        )

    def _all_are_one(self, counts: Tally, cluster: int, count: int) -> bool:
        recorded, end = self._survey.recorded, cluster + count
        return (
            end <= self._survey.clusters
            and counts.all_are_one(cluster, count)
            and all(map(recorded.is_known, range(cluster, end, recorded.per_block)))
            and recorded.is_known(end - 1)
        )

    async def _count_of(self, counts: Tally, offset: int) -> int | None:
        """How often a cluster is going to be counted; None: nobody knows."""
        cluster = offset >> self._header.cluster_bits
        survey = self._survey
        if cluster < survey.clusters and survey.recorded.is_known(cluster):
            return counts.get(cluster)
        return await survey.recorded.count(cluster)

    # ------------------------------------------------------------------ counts where they are

    async def _write_counts(self, survey: Survey, *, raises: bool) -> Tally:
        """Write those that are too low, or too high. Returns what all counts are when both is done."""
        final = Tally(self._header.refcount_order, self._most_bytes)
        freed: list[tuple[int, int]] = []
        changed: dict[int, list[tuple[int, int]]] = {}
        is_written = False
        for number in sorted({*survey.used.pieces(), *survey.recorded.tally.pieces()}):
            recorded, used = survey.recorded.tally.piece(number), survey.used.piece(number)
            if recorded == used:
                final.share(number, survey.used)
                continue
            target = recorded[:]
            for at, count, uses in differences(recorded, used):
                is_low = count < uses
                if not (self._errors if is_low else self._leaks):
                    continue
                target[at] = uses
                if is_low is raises:
                    cluster = number * PIECE + at
                    changed.setdefault(cluster // survey.recorded.per_block, []).append(
                        (cluster, uses)
                    )
                    self._count_fixed(is_low=is_low)
                    if not uses and len(freed) < _MOST_RUNS:
                        _add_run(freed, cluster)
            final.put(number, target)
            if sum(map(len, changed.values())) > _AT_ONCE:
                await self._write_blocks(survey, changed)
                changed, is_written = {}, True
        await self._write_blocks(survey, changed)
        is_written |= bool(changed)
        if is_written:
            await self._file.flush()
            await self._give_back(freed)
        return final

    def _count_fixed(self, *, is_low: bool) -> None:
        result = self._result
        if is_low:
            result.corruptions -= 1
            result.corruptions_fixed += 1
        else:
            result.leaks -= 1
            result.leaks_fixed += 1

    async def _write_blocks(
        self, survey: Survey, changed: dict[int, list[tuple[int, int]]]
    ) -> None:
        for index, counts in changed.items():
            block = await survey.recorded.block(index)
            assert block is not None
            for cluster, count in counts:
                block[cluster % survey.recorded.per_block] = count
            await self._write(survey.recorded.table[index], survey.recorded.codec.encode(block))
            survey.recorded.forget_block()

    async def _give_back(self, freed: list[tuple[int, int]]) -> None:
        size = self._header.cluster_size
        for first, count in freed:
            with contextlib.suppress(BlockError):  # it is a hint
                await self._file.pdiscard(first * size, count * size)

    # ------------------------------------------------------------------ counts elsewhere

    async def _rebuild(self) -> Survey:
        """Write all counts anew; and look at what that has made of the image."""
        result, old = self._result, self._survey
        result.say("Rebuilding refcount structure")
        new = await write_new_counts(self._file, self._header, old)
        await self._write_header(refcount_table_offset=new[0], refcount_table_clusters=new[1])
        # What the old counts took is leaked now, and nothing else.
        found = CheckResult(tell=result.say)
        again = Survey(self._file, self._header, found, most_bytes=self._most_bytes)
        self._survey = again
        await again.count(self._snapshots)
        await again.compare(says=False)
        if self._leaks:
            self._announce(again)
        if again.must_rebuild or found.check_errors:
            raise ImageError("The reference counts that were written anew are wrong")
        result.corruptions_fixed += max(result.corruptions - found.corruptions, 0)
        result.leaks_fixed += result.leaks
        result.corruptions, result.leaks = found.corruptions, found.leaks
        result.leaks_fixed -= found.leaks if self._leaks else 0
        result.check_errors = 0
        again.result = result
        return again

    # ------------------------------------------------------------------ the header

    async def _clear_marks(self) -> None:
        if self._header.incompatible & _MARKS:
            await self._file.flush()
            await self._write_header(incompatible=self._header.incompatible & ~_MARKS)

    async def _write_header(self, **fields: int) -> None:
        header = replace(self._header, **fields)  # type: ignore[arg-type]
        await self._write(0, header.to_bytes())
        await self._file.flush()
        self._header = header

    async def _write(self, offset: int, data: bytes) -> None:
        await self._file.pwritev(offset, IoVec.of(data))


def _add_run(runs: list[tuple[int, int]], cluster: int) -> None:
    """One more number, larger than all others."""
    if runs and sum(runs[-1]) == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((cluster, 1))

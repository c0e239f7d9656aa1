"""Repairs an image after a survey, in an order in which a crash makes nothing worse.

Theory of operation: counts that are too low can lose data, those that are too high only room. So

1. places that nobody needs and that cannot be right are dropped, each by one small write;
2. counts that are too low are raised; a flush. Where that is not possible, because there is no count, or what has it
   is damaged, all counts are written anew, to clusters that nobody uses, and after a flush the header is changed to
   name them. The old ones are whole until then, and leaked afterwards;
3. flags of clusters that may be written in place are made to agree with what the counts are going to be; a flush;
4. counts that are too high are lowered; a flush; what is free now goes back to the host;
5. if nothing is wrong any more, the header is cleared of what said so.

Whenever it is interrupted, what the disk shows is the same, nothing that is referred to is counted as free that was not
before, and the next repair finishes it.

Context: the control loop; nobody uses the image meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
from array import array
from dataclasses import replace

from vhostblk.block.check import CheckResult
from vhostblk.block.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import (
    MAX_OFFSET,
    MAX_REFCOUNT_TABLE_BYTES,
    SUBCLUSTERS,
    Header,
    Incompatible,
)
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.snapshots import load_snapshots
from vhostblk.block.drivers.qcow2.survey import MOST_BYTES, L2Table, Survey, difference
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Table, read_table
from vhostblk.block.drivers.qcow2.tally import PIECE, Tally, differences
from vhostblk.block.edge import Edge
from vhostblk.block.flags import CheckMode
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError, ImageError

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


async def repair_dirty(file: Edge, header: Header) -> CheckResult:
    """Repair an image that was not closed by somebody who puts off reference counts.

    Raises:
        ConfigError: it cannot be.
    """
    result = CheckResult()
    await check_image(file, header, CheckMode.FIX_LEAKS | CheckMode.FIX_ERRORS, result)
    if not result.is_clean:
        left = [message for message in result.messages if message.startswith("ERROR")]
        why = left[-1].removeprefix("ERROR ") if left else "leaks"
        raise ConfigError(f"Could not repair dirty image: {why}", errno.EIO)
    return result


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

    def _new_survey(self, header: Header, result: CheckResult) -> Survey:
        return Survey(self._file, header, result, fixes=self._errors, most_bytes=self._most_bytes)

    async def run(self) -> None:
        """All of it.

        Raises:
            BlockError: the child's errno.
            ImageError: why nothing, or nothing more, can be done.
        """
        result, survey = self._result, self._survey
        await survey.count()
        self.not_dropped = len(survey.misaligned)
        await survey.compare()
        if not self._fix:
            await self._check_flags(survey.recorded, repair=False)
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
        if not result.check_errors and not result.corruptions:
            await self._clear_marks()

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
        ranges += (await load_snapshots(self._file, header)).places()
        ranges += [(entry, size) for entry in self._survey.refcount_table if entry]
        places.add_all(at for start, length in ranges for at in range(start, start + length, size))
        return places

    def _announce(self, survey: Survey) -> None:
        """Say which counts are going to be changed, and which are not."""
        for number in sorted({*survey.used.pieces(), *survey.recorded.pieces()}):
            recorded, used = survey.recorded.piece(number), survey.used.piece(number)
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
        if survey.is_scattered(table) and self._flags_are_right(table, counts):
            return 0
        wrong: list[tuple[int, int]] = []
        for index, count, entry, _ in survey.runs(table):
            if entry & COMPRESSED or not survey.has_place(entry):
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
            entries = _bytes_of(table, first, last)
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
                survey.recorded_is_known(block * survey.per_block)
                for block in {cluster // survey.per_block for cluster in clusters}
            )
            and counts.each_is_one(clusters)
        )

    def _all_are_one(self, counts: Tally, cluster: int, count: int) -> bool:
        survey = self._survey
        return (
            cluster // PIECE == (cluster + count - 1) // PIECE
            and cluster + count <= survey.clusters
            and counts.all_are_one(cluster, count)
            and survey.recorded_is_known(cluster)
            and survey.recorded_is_known(cluster + count - 1)
        )

    async def _count_of(self, counts: Tally, offset: int) -> int | None:
        """How often a cluster is going to be counted; None: nobody knows."""
        cluster = offset >> self._header.cluster_bits
        survey = self._survey
        if cluster < survey.clusters and survey.recorded_is_known(cluster):
            return counts.get(cluster)
        return await survey.recorded_count(cluster)

    # ------------------------------------------------------------------ counts where they are

    async def _write_counts(self, survey: Survey, *, raises: bool) -> Tally:
        """Write those that are too low, or too high. Returns what all counts are when both is done."""
        final = Tally(self._header.refcount_order, self._most_bytes)
        freed: list[tuple[int, int]] = []
        changed: dict[int, list[tuple[int, int]]] = {}
        is_written = False
        for number in sorted({*survey.used.pieces(), *survey.recorded.pieces()}):
            recorded, used = survey.recorded.piece(number), survey.used.piece(number)
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
                    changed.setdefault(cluster // survey.per_block, []).append((cluster, uses))
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
            block = await survey.recorded_block(index)
            assert block is not None
            for cluster, count in counts:
                block[cluster % survey.per_block] = count
            await self._write(survey.refcount_table[index], survey.codec.encode(block))
            survey.forget_block()

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
        blocks, table_offset = self._place_all(old)
        for index, cluster in blocks.items():
            await self._write(cluster << self._header.cluster_bits, self._new_block(index))
        table = array("Q", [0]) * (table_offset[1] * self._header.cluster_size // 8)
        for index, cluster in blocks.items():
            table[index] = cluster << self._header.cluster_bits
        await self._write(table_offset[0], OFFSETS.encode(table))
        await self._file.flush()
        await self._write_header(
            refcount_table_offset=table_offset[0], refcount_table_clusters=table_offset[1]
        )
        # What the old counts took is leaked now, and nothing else.
        found = CheckResult(tell=result.say)
        again = Survey(self._file, self._header, found, most_bytes=self._most_bytes)
        self._survey = again
        await again.count()
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

    def _place_all(self, survey: Survey) -> tuple[dict[int, int], tuple[int, int]]:
        """Clusters for the new blocks, by index, and offset and clusters of the table."""
        header, used = self._header, survey.used
        entries = header.cluster_size // 8
        blocks: dict[int, int] = {}
        hint, clusters, table, end = 1, 0, 0, survey.clusters
        while True:
            missing = [index for index in self._needed_blocks(survey) if index not in blocks]
            for index in missing:
                hint = used.find_free(hint, 1, end)
                end = max(end, hint + 1)
                used.add(hint, 1)
                blocks[index] = hint
            if missing:
                continue
            needed = -(-(max(blocks) + 1) // entries)
            if needed <= clusters:
                break
            for cluster in range(table, table + clusters):
                used.set(cluster, 0)
            clusters = needed
            table = used.find_free(1, clusters, end)
            end = max(end, table + clusters)
            used.add(table, clusters)
        size = clusters * header.cluster_size
        if size > MAX_REFCOUNT_TABLE_BYTES or used.end() << header.cluster_bits > MAX_OFFSET:
            raise ImageError("There is no room for new reference counts")
        return blocks, (table << header.cluster_bits, clusters)

    def _needed_blocks(self, survey: Survey) -> list[int]:
        """Those that count anything."""
        needed: dict[int, None] = {}
        step = min(survey.per_block, PIECE)
        for number in survey.used.pieces():
            piece = survey.used.piece(number)
            for at in range(0, PIECE, step):
                if any(piece[at : at + step]):
                    needed[(number * PIECE + at) // survey.per_block] = None
        return list(needed)

    def _new_block(self, index: int) -> bytes:
        survey = self._survey
        counts: Table = survey.used.empty()[:0]
        first, end = index * survey.per_block, (index + 1) * survey.per_block
        for start in range(first, end, PIECE):
            at = start % PIECE
            counts.extend(survey.used.piece(start // PIECE)[at : at + min(PIECE, end - start)])
        return survey.codec.encode(counts)

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


def _bytes_of(table: L2Table, first: int, last: int) -> bytes:
    """These entries as they are in the file."""
    if table.bitmaps is None:
        return OFFSETS.encode(table.entries[first:last])
    pairs = array("Q", [0]) * (2 * (last - first))
    pairs[::2] = table.entries[first:last]
    pairs[1::2] = table.bitmaps[first:last]
    return OFFSETS.encode(pairs)


def _add_run(runs: list[tuple[int, int]], cluster: int) -> None:
    """One more number, larger than all others."""
    if runs and sum(runs[-1]) == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((cluster, 1))

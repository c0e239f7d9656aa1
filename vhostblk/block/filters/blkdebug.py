"""`blkdebug`: fails, delays and constrains requests on purpose (block layer row B43). Options and rules are QEMU's.

Theory of operation: the pipeline and formats report named *events*. An event activates the `inject-error` rules that
wait for it in the present state, replacing those that were active; the first `set-state` rule that fits changes the
state, once all others were looked at. A request fails with the errno of the first active rule that fits it; errno 0
lets it pass. A breakpoint suspends the next request that comes to its event, until `resume`.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.block.driver import OpenContext
from vhostblk.block.edge import Edge
from vhostblk.block.filters.blkdebug_config import read_config
from vhostblk.block.filters.breakpoints import Breakpoints
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_ALIGNMENT, SECTOR_SIZE
from vhostblk.block.options import (
    BOOLEAN,
    INTEGER,
    SIZE,
    STRING,
    NodeOptions,
    choice,
    consume_all,
    list_of,
    option,
    option_names,
    words_of,
)
from vhostblk.block.permissions import PERM_WORDS, Perm
from vhostblk.block.status import BlockStatus
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.registry import DriverRegistry

# What the pipeline and today's drivers report; formats add theirs.
EVENTS = (
    *("l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table"),
    *("l2_load", "l2_update", "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write"),
    *("read_aio", "read_backing_aio", "read_compressed", "write_aio", "write_compressed"),
    *("vmstate_load", "vmstate_save", "cow_read", "cow_write"),
    *("reftable_load", "reftable_grow", "reftable_update"),
    *("refblock_load", "refblock_update", "refblock_update_part"),
    *("refblock_alloc", "refblock_alloc_hookup", "refblock_alloc_write"),
    *("refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table"),
    *("cluster_alloc", "cluster_alloc_bytes", "cluster_alloc_space", "cluster_free"),
    *("flush_to_os", "flush_to_disk", "none", "empty_image_prepare", "cor_write"),
    *("pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail"),
    *("pwritev", "pwritev_zero", "pwritev_done"),
)
_EVENT = choice(*EVENTS)
_PERMS = ", ".join(PERM_WORDS)
# What QEMU's keeps to itself when it is asked for its name.
_UNNAMED = frozenset({"take-child-perms", "unshare-child-perms", "cache"})
_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")


@dataclass(frozen=True, slots=True)
class InjectError:
    """A rule: what fails, when, and how."""

    event: str = option(_EVENT, about="what activates the rule; none: it is active from the start")
    state: int = option(INTEGER, 0, about="only in this state; 0: in any")
    iotype: str | None = option(
        choice(*_TYPES), None, about="which requests fail; all but block-status if absent"
    )
    errno: int = option(INTEGER, errno.EIO, about="the error number")
    sector: int | None = option(INTEGER, None, about="only requests that touch this sector of 512")
    once: bool = option(BOOLEAN, False, about="only the first one")
    immediately: bool = option(BOOLEAN, False, about="fail before anybody else has a turn")

    def fits(self, kind: str, offset: int, length: int) -> bool:
        """Whether a request is meant."""
        if kind != self.iotype if self.iotype is not None else kind == "block-status":
            return False
        return self.sector is None or offset <= self.sector * SECTOR_SIZE < offset + length


@dataclass(frozen=True, slots=True)
class SetState:
    """A rule: an event changes the state."""

    event: str = option(_EVENT, about="what changes the state")
    new_state: int = option(INTEGER, about="the next state", name="new_state")
    state: int = option(INTEGER, 0, about="only in this state; 0: in any")


@dataclass(frozen=True, slots=True)
class BlkdebugOptions:
    """QEMU's options for blkdebug, besides `image`."""

    inject_error: tuple[InjectError, ...] = option(list_of(InjectError), (), about="errors")
    set_state: tuple[SetState, ...] = option(list_of(SetState), (), about="state changes")
    align: int = option(SIZE, 0, about="alignment of requests; 0: the image's")
    max_transfer: int = option(SIZE, 0, about="bytes of the largest transfer; 0: the image's")
    opt_write_zero: int = option(SIZE, 0, about="alignment of zero-writes; 0: the image's")
    max_write_zero: int = option(SIZE, 0, about="bytes of the largest zero-write; 0: the image's")
    opt_discard: int = option(SIZE, 0, about="alignment of discards; 0: the image's")
    max_discard: int = option(SIZE, 0, about="bytes of the largest discard; 0: the image's")
    take_child_perms: tuple[str, ...] = option(
        words_of(*PERM_WORDS),
        (),
        about="permissions to have on the image, needed or not: " + _PERMS,
    )
    unshare_child_perms: tuple[str, ...] = option(
        words_of(*PERM_WORDS),
        (),
        about="permissions that nobody else may have on the image: " + _PERMS,
    )
    config: str | None = option(STRING, None, about="a file of rules, in QEMU's format")


class BlkdebugNode(FilterNode):
    """See the module."""

    driver_name = "blkdebug"
    protocol_name = "blkdebug"
    options_type = BlkdebugOptions
    options: BlkdebugOptions
    child_key = "image"
    child_keys = ("image",)

    def __init__(self, name: str, common: Any, options: BlkdebugOptions) -> None:
        super().__init__(name, common, options)
        self.state = 1
        self._errors = list(options.inject_error)
        self._states = list(options.set_state)
        self._active: list[InjectError] = []
        self._breakpoints = Breakpoints()
        self._notice_rules()

    def _notice_rules(self) -> None:
        """Events cost time: they are told of only while one can mean something."""
        self.has_debug_events = bool(self._errors or self._states or self._breakpoints)

    @classmethod
    def parse_filename(cls, filename: str, drivers: DriverRegistry) -> dict[str, Any]:
        """`blkdebug:FILE OF RULES:IMAGE`, where there may be no rules; or just the image's.

        Raises:
            ConfigError: it is not of that form.
        """
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not filename.startswith("blkdebug:"):
            config, image = "", filename
        elif not colon:
            raise ConfigError("blkdebug requires both config file and image path")
        options = {f"image.{name}": value for name, value in drivers.options_of(image).items()}
        return {**options, "config": config} if config else options

    def naming_options(self) -> dict[str, Any]:
        """All that were given, as they were."""
        unnamed = option_names(NodeOptions) | _UNNAMED
        return {
            name: value for name, value in self.given.items() if name.split(".")[0] not in unnamed
        }

    def filename_over(self, child: str) -> str:
        """As `parse_filename` takes it, if there are no other options."""
        if self.naming_options().keys() - {"config"}:
            return ""
        return f"blkdebug:{self.options.config or ''}:{child}"

    async def driver_allocated_size(self) -> int:
        """As in QEMU, nobody knows; raises BlockError: ENOTSUP."""
        raise BlockError(errno.ENOTSUP, f"{self.node_name}: allocated size is not known")

    async def open(self, context: OpenContext) -> None:
        """Open the image, read the rules.

        Raises:
            ConfigError: a limit makes no sense, or the file of rules does not.
        """
        align = self.options.align
        if align & (align - 1) or align > MAX_ALIGNMENT:
            raise ConfigError(f"Cannot meet constraints with align {align}")
        if self.options.config is not None:
            sections = read_config(self.options.config)
            # Before the options', as in QEMU: of several rules that fit the first one decides.
            errors, states = sections.pop("inject-error", ()), sections.pop("set-state", ())
            self._errors[:0] = [consume_all(InjectError, rule) for rule in errors]
            self._states[:0] = [consume_all(SetState, rule) for rule in states]
            for name in sections:
                raise ConfigError(f"{self.options.config}: there is no group '{name}'")
        await super().open(context)
        self._apply("none")
        self._notice_rules()

    def refresh_limits(self) -> None:
        """As demanded."""
        asked, limits = self.options, self.limits
        align = asked.align or limits.request_alignment
        limits.request_alignment = align
        limits.max_transfer = asked.max_transfer or limits.max_transfer
        limits.pwrite_zeroes_alignment = asked.opt_write_zero or limits.pwrite_zeroes_alignment
        limits.max_pwrite_zeroes = asked.max_write_zero or limits.max_pwrite_zeroes
        limits.pdiscard_alignment = asked.opt_discard or limits.pdiscard_alignment
        limits.max_pdiscard = asked.max_discard or limits.max_pdiscard
        for name, value, unit in (
            ("max-transfer", asked.max_transfer, align),
            ("opt-write-zero", asked.opt_write_zero, align),
            ("max-write-zero", asked.max_write_zero, limits.zeroes_unit),
            ("opt-discard", asked.opt_discard, align),
            ("max-discard", asked.max_discard, limits.discard_unit),
        ):
            if value % unit or value > 0x7FFF_FFFF:
                raise ConfigError(f"Cannot meet constraints with {name} {value}")

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """As demanded, besides what is needed."""
        for word in self.options.take_child_perms:
            perm |= PERM_WORDS[word]
        for word in self.options.unshare_child_perms:
            shared &= ~PERM_WORDS[word]
        return perm, shared

    # ------------------------------------------------------------------ requests

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Unless a rule says otherwise."""
        await self._check("read", offset, length)
        await super().driver_preadv(offset, length, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Unless a rule says otherwise."""
        await self._check("write", offset, length)
        await super().driver_pwritev(offset, length, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Unless a rule says otherwise; what is less than a unit has no zero-write."""
        unit = self.limits.zeroes_unit
        if offset % unit or length % unit:
            raise BlockError(errno.ENOTSUP)
        await self._check("write-zeroes", offset, length)
        await super().driver_pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """Unless a rule says otherwise; what is less than a block is not discarded."""
        if length < self.limits.request_alignment:
            raise BlockError(errno.ENOTSUP)
        await self._check("discard", offset, length)
        await super().driver_pdiscard(offset, length)

    async def driver_flush_to_disk(self) -> None:
        """Unless a rule says otherwise."""
        await self._check("flush", 0, 0)

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """Unless a rule says otherwise."""
        await self._check("block-status", offset, length)
        return await super().driver_block_status(offset, length, precise)

    async def _check(self, kind: str, offset: int, length: int) -> None:
        rule = next((rule for rule in self._active if rule.fits(kind, offset, length)), None)
        if rule is None or not rule.errno:
            return
        if rule.once:
            self._active.remove(rule)
            self._errors.remove(rule)
            self._notice_rules()
        if not rule.immediately:
            await asyncio.sleep(0)
        raise BlockError(rule.errno)

    # ------------------------------------------------------------------ events

    async def driver_debug_event(self, event: str) -> None:
        """Apply the rules, stop at breakpoints."""
        assert event in EVENTS, event
        self._apply(event)
        try:
            await self._breakpoints.reach(event)
        finally:
            self._notice_rules()

    def _apply(self, event: str) -> None:
        fresh = [
            rule for rule in self._errors if rule.event == event and rule.state in (0, self.state)
        ]
        if fresh:
            self._active = fresh
        # Of several that fit the first decides, as in QEMU.
        for change in self._states:
            if change.event == event and change.state in (0, self.state):
                self.state = change.new_state
                break

    def add_breakpoint(self, event: str, tag: str) -> None:
        """Suspend the next request that comes to an event.

        Raises:
            BlockError: ENOENT; there is no such event.
        """
        if event not in EVENTS:
            raise BlockError(errno.ENOENT, f"{self.node_name}: no event '{event}'")
        self._breakpoints.add(event, tag)
        self._notice_rules()

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the breakpoints with this tag, and let go who is suspended there.

        Raises:
            BlockError: ENOENT; there is none.
        """
        if not self._breakpoints.remove(tag):
            raise BlockError(errno.ENOENT, f"{self.node_name}: no breakpoint '{tag}'")
        self._notice_rules()

    def resume(self, tag: str) -> None:
        """Let go who was suspended last with this tag.

        Raises:
            BlockError: ENOENT; nobody is.
        """
        if not self._breakpoints.resume(tag):
            raise BlockError(errno.ENOENT, f"{self.node_name}: nothing is suspended as '{tag}'")
        self._notice_rules()

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is suspended with this tag."""
        return self._breakpoints.is_suspended(tag)

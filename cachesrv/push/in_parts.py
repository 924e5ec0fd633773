"""Large NARs to the server in parts, several at once; an interrupted one goes on where it was. Those that go straight
to its storage may be smaller: what is a single part goes there in one piece.

A NAR is read again when it is taken up, and compressed again, which gives the same bytes; parts that the server has are
known by their sha256 and not sent. So nothing has to be kept here, and what is resumed is verified, also when another
machine has begun it. Where the level of compression is not the same for all NARs, the server is asked with which one a
NAR was begun. What stands in the journal of this machine, and what the server has indeed, is not compressed again; such
a NAR keeps its level.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from cachesrv.errors import CachesrvError, Mismatch, Refused, TooLarge
from cachesrv.nix.seekable import largest_file
from cachesrv.push.alone import Alone
from cachesrv.push.arrived import Arrived, ArrivedPart, OtherBytes
from cachesrv.push.events import Resumed, Sent
from cachesrv.push.foremost import foremost
from cachesrv.push.frame import recipe
from cachesrv.push.nar_upload import NarUpload, begun_uploads, upload_name
from cachesrv.push.part_memory import PartMemory
from cachesrv.push.part_sender import PartSender
from cachesrv.push.parts import cut
from cachesrv.push.retry import TryAgain
from cachesrv.push.ways import NoStorage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from cachesrv.api import CacheAnswer, DirectAnswer
    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.arrived import Transfer
    from cachesrv.push.compressed_nar import CompressedNar
    from cachesrv.push.events import Emit
    from cachesrv.push.part_memory import Share
    from cachesrv.push.parts import Part
    from cachesrv.push.pipeline import Pipeline
    from cachesrv.push.server import Server
    from cachesrv.push.transfers import Transfers
    from cachesrv.push.ways import WayOfParts

_LARGEST = 8 * 2**20
_SMALLEST = 2**20
"""Bytes of a part. Larger ones would cost memory, and more when they are lost; smaller ones cost requests."""

_SMALLEST_PIECE = 4 * 2**20
"""Bytes of a NAR that goes to the storage as a single part: smaller ones cost more there in requests than they save."""

_SMALLEST_DIRECT = 5 * 2**20
_MOST_DIRECT = 10_000
"""What S3 takes: bytes of a part, and parts of an object."""

_AT_ONCE = 3
"""Parts that should fit into memory together."""


def part_memory(total: int) -> PartMemory:
    """Of about `total` bytes."""
    fitting = total // _AT_ONCE // _SMALLEST * _SMALLEST
    size = min(_LARGEST, max(_SMALLEST, fitting))
    return PartMemory(size, max(1, total // size))


class InParts:
    """Sends NARs in parts: of at most `part_size` bytes through the server, or to its storage where it offers that and
    we can reach it.
    """

    def __init__(
        self, server: Server, pipeline: Pipeline, cache: CacheAnswer, transfers: Transfers, *, emit: Emit
    ) -> None:
        self._server = server
        self._transfers = transfers
        self._pipeline = pipeline
        self._emit = emit
        self.memory = part_memory(pipeline.shares.parts)
        self._largest = min(cache.part_size, self.memory.size)
        direct = cache.direct and self.memory.size >= _SMALLEST_DIRECT
        self._sender = PartSender(pipeline, direct=direct, emit=emit)
        self._alone = Alone(server, pipeline, self._sender, emit=emit)
        self._not_direct: set[Hash] = set()

    @property
    def _part_size(self) -> int:
        return self._server.bodies.within(self._largest)

    def is_for(self, nar_size: int) -> bool:
        """Whether a NAR of so many bytes may become more than one part, or has to be made before it is sent, as for the
        storage; 0 if its size is not known.
        """
        if self._server.bodies.lengths or not nar_size or largest_file(nar_size) > self._part_size:
            return True
        return self._alone.to_storage and nar_size > _SMALLEST_PIECE

    def share(self, info: PathInfo) -> AbstractAsyncContextManager[Share]:
        """Memory for the parts of a NAR."""
        alone = info.nar_size > 0 and largest_file(info.nar_size) <= self._form(info).part_size
        return self.memory.share(1) if alone else self.memory.share()

    async def take_up(self, info: PathInfo) -> TakenUp | None:
        """Where the NAR was left, by whomever; None when it turns out to be there. Raises what the server says."""
        form = self._form(info)
        for noted, parts in await self._transfers.begun(info.nar_hash):
            upload = self._upload(info, noted.level, form)
            if noted.upload == upload.name:
                way = await self._begin(upload, form, noted)
                if way is None:
                    return None
                there = [part for part in parts if way.recall(part.number, part.digest, part.tag)]
                return TakenUp(noted.level, form, way, Arrived.of(there, form.part_size))
        return TakenUp(await self._level(info, form), form)

    async def over(self, info: PathInfo) -> None:
        """The NAR is there: forget whatever was begun of it otherwise."""
        for noted in self._transfers.over(info.nar_hash):
            used = self._upload(info, noted.level, self._form(info))
            if noted.upload != used.name:
                with suppress(CachesrvError):
                    await NarUpload(self._server, info, noted.upload, emit=self._emit).abort()

    async def _level(self, info: PathInfo, form: Form) -> int:
        """That with which the NAR was begun, by whomever, else the one that is chosen for what begins now."""
        chosen, levels = self._pipeline.choose_level(), self._pipeline.levels
        if len(levels) == 1:
            return chosen
        names = {level: self._upload(info, level, form).name for level in levels}
        begun = await begun_uploads(self._server, list(names.values()))
        # the higher, the more work has gone into it
        return max((level for level, name in names.items() if name in begun), default=chosen)

    def _form(self, info: PathInfo) -> Form:
        """It does not go to the storage where its size is not known, or the server has not offered that."""
        fits = info.nar_size > 0 and largest_file(info.nar_size) <= self.memory.size * _MOST_DIRECT
        direct = self._sender.direct and fits and info.nar_hash not in self._not_direct
        return Form(direct, self.memory.size if direct else self._part_size)

    def _upload(self, info: PathInfo, level: int, form: Form) -> NarUpload:
        name = upload_name(info.nar_hash, recipe(level), form.part_size, direct=form.direct)
        return NarUpload(self._server, info, name, emit=self._emit)

    async def send(self, nar: CompressedNar, share: Share, taken_up: TakenUp) -> bool:
        """The NAR is at the server when this returns; False when it was there, and not all of it was sent from here.

        Raises what the NAR does, what the server says, and TryAgain, with `tried` unset where it helps to begin anew.
        """
        try:
            return await self._send(nar, share, taken_up)
        except (OtherBytes, Refused) as error:
            if not taken_up.arrived.parts:
                raise
            name = self._upload(nar.info, nar.level, taken_up.form).name
            self._transfers.forget(self._transfers.transfer(nar.info.nar_hash, name, nar.level))
            raise TryAgain(f"{error}: it is made anew") from error

    async def _send(self, nar: CompressedNar, share: Share, taken_up: TakenUp) -> bool:
        info, form, arrived = nar.info, taken_up.form, taken_up.arrived
        upload = self._upload(info, nar.level, form)
        async with aclosing(cut(nar, share, form.part_size, arrived.parts)) as parts:
            first = await anext(parts)
            sent = await self._send_alone(nar, share, upload, first, taken_up)
            if sent is not None:
                return sent
            noted = self._transfers.transfer(info.nar_hash, upload.name, nar.level)
            await self._transfers.begin(noted)
            way = taken_up.way or await self._begin(upload, form, noted)
            if way is None:
                return False
            transfer = _Transfer(nar, share, upload, way, noted, form.part_size)
            await self._send_all(transfer, first, parts)
        if transfer.resumed:
            count = len(transfer.resumed)
            self._emit(Resumed(transfer.name, sum(transfer.resumed), count, transfer.parts))
        await upload.complete(way)
        return True

    async def _begin(self, upload: NarUpload, form: Form, noted: Transfer) -> WayOfParts | None:
        way = await upload.begin(direct=form.direct)
        if way is not None and form.direct and not self._fits(upload.info, way.direct):
            await self._begin_otherwise(upload, noted)
        return way

    def _fits(self, info: PathInfo, offered: DirectAnswer | None) -> bool:
        """Whether what was cut to go to the server's storage can go the way that the server says."""
        size = self.memory.size
        if offered is None:
            return size <= self._part_size
        return offered.least <= size and largest_file(info.nar_size) <= offered.most * size

    async def _begin_otherwise(self, upload: NarUpload, noted: Transfer) -> NoReturn:
        self._not_direct.add(upload.info.nar_hash)
        await self._give_up(upload, noted)
        raise TryAgain("the server does not take it in these parts in its storage: it goes through the server")

    async def _send_alone(
        self, nar: CompressedNar, share: Share, upload: NarUpload, part: Part, taken_up: TakenUp
    ) -> bool | None:
        """As `send`, if this is the only part, and can be sent without an upload of parts; else None."""
        if not part.last or taken_up.arrived.parts:
            return None
        if self._alone.to_storage:
            sent = await self._alone.to_the_storage(upload, part, share)
            if sent is not None:
                return sent
        if part.size <= self._part_size:
            await self._alone.through_the_server(nar, part)
            return True
        if taken_up.form.direct and not self._sender.direct:
            raise TryAgain("it goes through the server, in smaller parts")
        return None

    async def _send_all(self, transfer: _Transfer, first: Part, parts: AsyncIterator[Part]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_part(transfer, first))
                async for part in parts:
                    tasks.create_task(self._send_part(transfer, part))
        except BaseExceptionGroup as group:
            error = foremost(group)
            if isinstance(error, Mismatch | TooLarge):
                await self._give_up(transfer.upload, transfer.noted)
            raise error from None

    async def _send_part(self, transfer: _Transfer, part: Part) -> None:
        transfer.parts += 1
        if part.buffer is None:
            self._was_there(transfer, part)
        else:
            await self._send_made(transfer, part)
            transfer.share.give(part.buffer)
        self._emit(Sent(transfer.name, part.nar_bytes, 0))

    async def _send_made(self, transfer: _Transfer, part: Part) -> None:
        way = transfer.way
        digest = await self._sender.digest(way, part)
        if way.has(part.number, digest):
            self._was_there(transfer, part)
        else:
            try:
                await self._sender.put(transfer.upload, way, part, digest)
            except NoStorage as error:
                await self._leave_storage(transfer, error)
        start = (part.number - 1) * transfer.part_size
        frames = transfer.nar.frames_from(start, start + part.size)
        arrived = ArrivedPart(part.number, part.size, digest, way.tag(part.number), *frames)
        self._transfers.arrived(transfer.noted, arrived)

    def _was_there(self, transfer: _Transfer, part: Part) -> None:
        transfer.resumed.append(part.size)
        if transfer.way.direct is None:
            self._server.bodies.taken(part.size)

    async def _leave_storage(self, transfer: _Transfer, error: NoStorage) -> NoReturn:
        self._sender.leave_storage(error)
        await self._give_up(transfer.upload, transfer.noted)
        raise TryAgain(str(error)) from error

    async def _give_up(self, upload: NarUpload, noted: Transfer) -> None:
        """Nobody can go on with these parts."""
        self._transfers.forget(noted)
        with suppress(CachesrvError):
            await upload.abort()


@dataclass(frozen=True, slots=True)
class Form:
    """Parts of so many bytes, which go to the server's storage if that is offered and they are `direct`."""

    direct: bool
    part_size: int


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A NAR that is to be sent with this level and in this form; `way` and `arrived` where it was begun from here."""

    level: int
    form: Form
    way: WayOfParts | None = None
    arrived: Arrived = field(default_factory=Arrived)


@dataclass(slots=True)
class _Transfer:
    """One NAR on its way, in so many `parts` up to now; `resumed`: bytes of those that had been there."""

    nar: CompressedNar
    share: Share
    upload: NarUpload
    way: WayOfParts
    noted: Transfer
    part_size: int
    parts: int = 0
    resumed: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the path."""
        return self.nar.info.store_path.base_name

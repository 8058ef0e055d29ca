"""The remotes that a store knows: records of database `meta` (docs/format.md, "Remote record").

Owns their names and numbers. A remote's number, by which place records name it, is the beginning of
its UUID: it is the same again when a remote is removed and added again, or its record was lost, and
no two remotes of a store have the same. Thread-safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

import lmdb

from dedupstore import catalog, format as fmt
from dedupstore.env import Environment
from dedupstore.errors import RemoteError, RemoteNotFoundError, StoreDamagedError, UsageError, shown
from dedupstore.remote.objects import check_url
from dedupstore.remote.remote import Remote

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
# Of a record, and what a key of a place record could ever name.
_URL_BYTES_MAX = 2048
_URLS_MAX = 16

NeededBy = Callable[[lmdb.Transaction, int], str | None]
"""Says what of the store still needs the remote with a number, None: nothing."""


def add_remote(env: Environment, name: str, urls: Sequence[str]) -> Remote:
    """Make a remote known under `name`; one is made at the first URL if there is none, and it can
    be written. The further URLs are mirrors of it, which may still be empty.

    Raises UsageError, RemoteError: the name, or the remote, is known already, or a URL is of
    another remote.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"remote {shown(name)}: a name has 1 to 64 of A-Z a-z 0-9 . _ - and begins with none "
            "of the last three"
        )
    checked = tuple(dict.fromkeys(check_url(url) for url in urls))
    if len(checked) > _URLS_MAX or any(len(url.encode()) > _URL_BYTES_MAX for url in checked):
        raise UsageError(f"remote {shown(name)}: too many or too long URLs")
    uuid = Remote(0, name, checked[:1]).init().uuid
    for url in checked[1:]:
        mirror = Remote(0, name, [url])
        try:
            if mirror.info().uuid == uuid:
                continue
        except RemoteNotFoundError:
            continue
        raise RemoteError(f"{mirror.objects.where}: is another remote, no mirror of the first URL")
    number = int.from_bytes(uuid.bytes[:4], "little")
    key = fmt.remote_key(name)
    with env.write() as txn:
        for known, record in list_remotes(txn, env):
            if known == name:
                raise RemoteError(f"remote {shown(name)} is there already (see 'remote ls')")
            if isinstance(record, fmt.RemoteRecord) and record.number == number:
                raise RemoteError(f"remote {shown(name)} is known as {shown(known)} already")
        record = fmt.RemoteRecord(number, uuid.bytes, checked)
        txn.put(key, fmt.encode_remote(record, key), db=env.meta)
        catalog.note_feature(txn, env, fmt.FEATURE_COMPAT_REMOTES)
    return Remote(number, name, checked)


def remove_remote(env: Environment, name: str, needed_by: NeededBy) -> None:
    """Forget a remote; what is in it stays. Raises RemoteNotFoundError, RemoteError: the store
    needs it."""
    with env.write() as txn:
        record = _find(txn, env, name)
        if isinstance(record, fmt.RemoteRecord):
            needer = needed_by(txn, record.number)
            if needer is not None:
                raise RemoteError(f"remote {shown(name)} is needed by {needer}")
        txn.delete(fmt.remote_key(name), db=env.meta)


def list_remotes(
    txn: lmdb.Transaction, env: Environment
) -> Iterator[tuple[str, fmt.RemoteRecord | StoreDamagedError]]:
    """(name, record or what is wrong with it) of every remote, in the order of the names."""
    prefix = fmt.remote_key("")
    cursor = txn.cursor(db=env.meta)
    if not cursor.set_range(prefix):
        return
    for key, record in cursor:
        if not bytes(key).startswith(prefix):
            return
        name = fmt.decode_remote_key(key)
        if name is not None:
            try:
                yield name, fmt.decode_remote(record, bytes(key))
            except StoreDamagedError as error:
                yield name, error


def find_remote(env: Environment, name: str) -> tuple[Remote, UUID]:
    """A remote that the store knows, and its UUID. Raises RemoteNotFoundError or
    StoreDamagedError."""
    with env.read() as txn:
        record = _find(txn, env, name)
    if isinstance(record, StoreDamagedError):
        raise record
    return Remote(record.number, name, record.urls), UUID(bytes=record.uuid)


def find_to_change(env: Environment, name: str) -> tuple[Remote, UUID]:
    """As `find_remote`; and what is at the first URL is still the remote that was added."""
    remote, uuid = find_remote(env, name)
    if remote.info_now().uuid != uuid:
        raise RemoteError(
            f"remote {shown(name)}: {remote.objects.where} is another one than when it was added "
            "('remote rm' and 'remote add' it)"
        )
    return remote, uuid


def find_number(env: Environment, number: int) -> Remote:
    """The remote with a number of a place record. Raises RemoteNotFoundError."""
    with env.read() as txn:
        for name, record in list_remotes(txn, env):
            if isinstance(record, fmt.RemoteRecord) and record.number == number:
                return Remote(number, name, record.urls)
    raise RemoteNotFoundError(
        f"the store does not know remote number {number} any more (add it again: 'remote add')"
    )


def _find(
    txn: lmdb.Transaction, env: Environment, name: str
) -> fmt.RemoteRecord | StoreDamagedError:
    for known, record in list_remotes(txn, env):
        if known == name:
            return record
    raise RemoteNotFoundError(f"no remote named {shown(name)} (see 'dedupstore remote ls')")

"""How values become bytes and back. Pure: no client, no clock.

Bytes say themselves how they are read: ``pack`` gives a short text beside them (``how``: "" for MessagePack,
"json", "pickle", each with "zlib" or "zstd" if compressed, as in "json+zlib"), and ``unpack`` goes by that text and
not by the codec's own settings. So a format may be changed while entries of the old one are still stored.

Invariant: whatever the bytes are, ``unpack`` gives a value of the type that was asked for or raises ``Undecodable``.
Nothing is unpickled, nor decompressed for that, before its signature was verified, and nothing expands beyond
``max_bytes``. No message of ``Undecodable`` quotes a stored value.
"""

import hmac
import inspect
import json
import pickle
import types
import typing
import zlib
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import PurePath
from typing import Any, Literal

import msgspec

from .errors import ValueTooLarge

Buffer = bytes | memoryview

SHORTEST_SECRET_BYTES = 16
LARGEST_BYTES = 512 * 1024 * 1024  # what Redis stores under one key, unless it is told otherwise

_FORMATS = ("msgpack", "json")
_COMPRESSIONS = ("zlib", "zstd")
_HOW = {
    (format, compression): "+".join(part for part in (format, compression) if part)
    for format in ("", "json", "pickle")
    for compression in ("", *_COMPRESSIONS)
}
_PARTS = {how: parts for parts, how in _HOW.items()}


class Undecodable(Exception):
    """Stored bytes are not what they claim to be, or not of the type that was asked for."""


class NotEncodable(TypeError):
    """A value has no form in the codec's format, or would come back from it as another value."""


# Typed values: msgspec knows most types itself. The hooks are asked for the others.

_AS_TEXT = (PurePath, IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
"""Classes whose text makes an equal object again."""


@lru_cache(maxsize=256)
def _knows_names(kind: Any) -> bool:
    """Whether a model can be validated by its fields' names (pydantic 2.11) and not only by their aliases."""
    return "by_name" in inspect.signature(kind.model_validate).parameters


def _as_plain(value: Any) -> Any:
    """What MessagePack stores for a value that msgspec does not know. Models are known by what they can do."""
    kind: Any = type(value)
    if hasattr(kind, "model_dump") and hasattr(kind, "model_validate"):
        # As Python objects, not as JSON: a secret would be stored as asterisks, and bytes as if they were text.
        if _knows_names(kind):
            return value.model_dump(round_trip=True, by_alias=False, warnings="error")
        return value.model_dump(round_trip=True, by_alias=True)
    if isinstance(value, _AS_TEXT) or hasattr(kind, "unicode_string"):  # the second are the URLs of pydantic
        return str(value)
    raise TypeError(f"a {kind.__name__} has no such form")


def _as_plain_for_json(value: Any) -> Any:
    """The same for JSON. Models would take the text that stands for bytes for the bytes: they may hold none."""
    plain = _as_plain(value)
    if not isinstance(plain, str):
        buffers = (bytes, bytearray, memoryview)
        try:
            json.dumps(msgspec.to_builtins(plain, builtin_types=buffers, str_keys=True, enc_hook=_as_plain))
        except TypeError as error:
            reason = f"a {type(value).__name__} that holds bytes would come back changed from JSON; use msgpack"
            raise TypeError(reason if "bytes" in str(error) or "memoryview" in str(error) else str(error)) from None
    return plain


def _restored(kind: Any, plain: Any) -> Any:
    """An object of a class that msgspec does not know, from what was stored for it."""
    try:
        if hasattr(kind, "model_validate"):
            # Not strict: the format has no sets, Decimals or UUIDs, so that a strict model would never come back.
            by = {"by_name": True, "by_alias": False} if _knows_names(kind) else {}
            found = kind.model_validate(plain, strict=False, **by)
        elif isinstance(plain, str) and (issubclass(kind, _AS_TEXT) or hasattr(kind, "unicode_string")):
            found = kind(plain)
        else:
            found = plain
    except Exception as error:  # noqa: BLE001 - the model's own code; its message would quote the stored value
        raise ValueError(f"Expected `{kind.__name__}`, which refused it ({type(error).__name__})") from None
    return found  # msgspec sees to it that this is one of ``kind``


Decode = Callable[[Buffer], Any]


def _new_decoder(format: str, kind: Any) -> Decode:
    if format:
        return msgspec.json.Decoder(kind, dec_hook=_restored).decode
    return msgspec.msgpack.Decoder(kind, dec_hook=_restored).decode


_kept_decoder = lru_cache(maxsize=256)(_new_decoder)


def _decoder(format: str, kind: Any) -> Decode:
    """The decoder of a type; making one costs far more than using it. Raises ``TypeError`` for what is no type."""
    try:
        return _kept_decoder(format, kind)
    except TypeError:  # a type that cannot be hashed, or that msgspec refuses, and then here again
        return _new_decoder(format, kind)


_encode_msgpack = msgspec.msgpack.Encoder(enc_hook=_as_plain).encode
_decode_msgpack = msgspec.msgpack.Decoder().decode
_dump_json = msgspec.json.Encoder(enc_hook=_as_plain_for_json).encode
_decode_json = msgspec.json.Decoder().decode


def _encode_json(value: object) -> bytes:
    """JSON that says the same as the value. What would be lost without a word is refused here."""
    data = _dump_json(value)
    if b"null" in data:  # JSON has no NaN and no infinity: they, too, are written as null
        try:
            json.dumps(msgspec.to_builtins(value, enc_hook=_as_plain), allow_nan=False)
        except ValueError:
            raise ValueError("JSON has no NaN and no infinity; use msgpack") from None
    if len(_dump_json(_decode_json(data))) != len(data):
        raise ValueError("two keys of one dict are the same text in JSON; use msgpack")
    return data


def _encode_pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=5)


def _fits(value: object, kind: Any) -> bool:
    """Whether an unpickled object is of a type, as far as its outside tells."""
    origin = typing.get_origin(kind)
    if kind is Any or isinstance(kind, typing.TypeVar):
        return True
    if kind is None:
        return value is None
    if origin is typing.Annotated or isinstance(kind, typing.NewType):
        return _fits(value, kind.__origin__ if origin else kind.__supertype__)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(kind))
    if typing.is_typeddict(kind):
        return isinstance(value, dict)
    return isinstance(value, (int, float) if kind is float else origin or kind)


# Compression


def _zstandard() -> Any:
    import zstandard  # late: optional, and few need it

    return zstandard


def _compress(data: bytes, compression: str) -> bytes:
    if compression == "zlib":
        return zlib.compress(data, 1)
    compressed: bytes = _zstandard().ZstdCompressor(level=1).compress(data)  # no thread may use one with another
    return compressed


def _expand(data: Buffer, compression: str, max_bytes: int) -> bytes:
    """The one whole stream that ``data`` is. Takes no more memory than ``max_bytes``, whatever the stream says."""
    if compression == "zlib":
        stream = zlib.decompressobj()
        plain = stream.decompress(data, max_bytes + 1)
        if len(plain) > max_bytes:
            raise Undecodable(f"expands beyond max_bytes={max_bytes}")
        if not stream.eof or stream.unused_data:
            raise Undecodable("the compressed data " + ("goes on after its end" if stream.eof else "has no end"))
        return plain
    try:
        zstandard = _zstandard()
    except ImportError:
        raise Undecodable("compressed with zstd, which is not installed: pip install petiole[zstd]") from None
    # The size that a frame announces is the memory it is given. Frames of this module always announce it.
    size = zstandard.frame_content_size(data)
    if not 0 <= size <= max_bytes:
        raise Undecodable(f"expands beyond max_bytes={max_bytes}, or does not say how far")
    whole: bytes = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    return whole


class Pickle:
    """Pickle as a codec's format: any Python object, signed. Chosen by name, never by default.

    ::

        Codec(Pickle(b"a new secret of 16 bytes or more", b"the one before it"))

    Promises: only bytes that a holder of a secret signed, for this very Redis key, are unpickled.
    Does not promise: safety from whoever knows a secret; with it they run code in every process that reads.

    Arguments:
        secrets: the first one signs, each of them verifies, so that secrets can be replaced one by one. Each has
            at least 16 bytes.

    Raises ``TypeError`` or ``ValueError`` for secrets that are no bytes, too short, or missing.
    """

    __slots__ = ("_keyed",)

    def __init__(self, *secrets: bytes) -> None:
        if not secrets:
            raise ValueError("Pickle needs a secret to sign with: Pickle(secret)")
        for place, secret in enumerate(secrets, start=1):
            if not isinstance(secret, bytes):
                raise TypeError(f"secret {place} of Pickle must be bytes, not {type(secret).__name__}")
            if len(secret) < SHORTEST_SECRET_BYTES:
                raise ValueError(
                    f"secret {place} of Pickle has {len(secret)} bytes, fewer than {SHORTEST_SECRET_BYTES}; "
                    "make one with secrets.token_bytes(32)"
                )
        # Only what the secrets are needed for is kept: it can be neither shown nor pickled.
        self._keyed = tuple(hmac.new(secret, digestmod="sha256") for secret in secrets)

    def __repr__(self) -> str:
        return f"Pickle({', '.join('***' for _ in self._keyed)})"

    def signed(self, body: bytes, how: str, name: str) -> bytes:
        """The signature, then the body."""
        return _signature(self._keyed[0], body, how, name) + body

    def verified(self, data: Buffer, how: str, name: str) -> memoryview:
        """The body of what ``signed`` made for the same name. Raises ``Undecodable``."""
        view = memoryview(data).cast("B")
        signature, body = view[:_SIGNATURE_BYTES], view[_SIGNATURE_BYTES:]
        for keyed in self._keyed:
            if hmac.compare_digest(_signature(keyed, body, how, name), signature):
                return body
        raise Undecodable("no secret of this codec has signed this pickle for this key")


_SIGNATURE_BYTES = 32
_CONTEXT = b"petiole.cachelib pickle 1"  # a signature made for another purpose is not one for this


def _signature(keyed: hmac.HMAC, body: Buffer, how: str, name: str) -> bytes:
    """What binds the body to its key and its reading. Lengths go first, so that no two inputs meet."""
    parts = (_CONTEXT, name.encode("utf-8", "surrogatepass"), how.encode())
    head = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    mac = keyed.copy()
    mac.update(head + len(body).to_bytes(8, "big"))
    mac.update(body)
    return mac.digest()


class Codec:
    """Values to bytes and back.

    ::

        codec = Codec()
        how, data = codec.pack({"price": Decimal("9.50")}, name)
        codec.unpack(how, data, name, dict[str, Decimal])

    Promises: what was packed comes back equal when its type is given to ``unpack``: dataclasses, msgspec structs,
    attrs classes, pydantic models, ``datetime`` and its kin, ``Decimal``, ``UUID``, sets, tuples, enums (of text or of
    numbers), named tuples, typed dicts, paths, IP addresses, and ``list``, ``dict`` and ``Optional`` of them. Without
    a type, it comes back as what the format has. Bytes that are damaged, foreign, hostile or of another type raise
    ``Undecodable``.

    Does not promise, of MessagePack: without a type, tuples and sets come back as lists, objects as dicts, and
    ``Decimal``, ``UUID``, enums and datetimes without a zone as text or number. A datetime with a zone comes back as
    the same instant in UTC. Whole numbers beyond 64 bits are refused. A key that is an enum, ``UUID`` or the like
    meets the key that is its text.

    Does not promise, of JSON, furthermore: without a type, bytes come back as base64 text, keys that are numbers as
    text, and every datetime as text. With a type they come back. What no type can bring back is refused: NaN and
    infinity, two keys that are the same text, bytes in a pydantic model.

    Does not promise, of pickle: of the type given to ``unpack`` only the outermost class is compared.

    Of pydantic models it is the fields that are stored, not private attributes, nor what the model excludes.

    Arguments:
        format: ``"msgpack"``, ``"json"``, or ``Pickle(secret)``.
        compression: ``"zlib"``, or ``"zstd"`` (``pip install petiole[zstd]``); both at level 1.
        compress_above: how many bytes are stored as they are. Longer values are compressed if that makes them
            shorter. None: never.
        max_bytes: how many bytes a value may have before compression, and expand to when it is read. What takes longer
            to send than the cache's timeout is no good to anybody.

    Raises ``TypeError`` or ``ValueError`` for arguments that do not fit.
    """

    __slots__ = ("_encode", "_format", "_pickle", "_plain_up_to", "compress_above", "compression", "max_bytes")

    def __init__(
        self,
        format: Literal["msgpack", "json"] | Pickle = "msgpack",
        *,
        compression: Literal["zlib", "zstd"] = "zlib",
        compress_above: int | None = 16_384,
        max_bytes: int = 8 * 1024 * 1024,
    ) -> None:
        self._pickle = format if isinstance(format, Pickle) else None
        if self._pickle is None:
            _check_format(format)
        _check_choice(compression, _COMPRESSIONS, "compression")
        if compression == "zstd":
            try:
                _zstandard()
            except ImportError:
                raise ValueError("compression='zstd' is not installed: pip install petiole[zstd]") from None
        if compress_above is not None:
            _check_number(compress_above, "compress_above", 0)
        _check_number(max_bytes, "max_bytes", 1)
        if max_bytes > LARGEST_BYTES:
            raise ValueError(f"max_bytes={max_bytes} is more than Redis stores under one key, {LARGEST_BYTES}")
        self._format = "pickle" if self._pickle else "" if format == "msgpack" else "json"
        self._encode: Callable[[object], bytes] = {
            "": _encode_msgpack,
            "json": _encode_json,
            "pickle": _encode_pickle,
        }[self._format]
        self.compression = compression
        self.compress_above = compress_above
        self.max_bytes = max_bytes
        # Up to here nothing but the format is left to do. A pickle must be signed, always.
        self._plain_up_to = (
            -1 if self._pickle else min(max_bytes, max_bytes if compress_above is None else compress_above)
        )

    def __repr__(self) -> str:
        return (
            f"Codec({self._pickle or self._format or 'msgpack'!r}, compression={self.compression!r}, "
            f"compress_above={self.compress_above}, max_bytes={self.max_bytes})"
        )

    def pack(self, value: object, name: str) -> tuple[str, bytes]:
        """How the bytes are to be read, and the bytes.

        Arguments:
            value: anything that the format has a form for.
            name: the full name of the Redis key. A pickle is signed for it.

        Raises ``NotEncodable`` with the reason, ``ValueTooLarge`` for more than ``max_bytes``.
        """
        try:
            data = self._encode(value)
        except Exception as error:
            raise NotEncodable(self._why_not(value, error)) from error
        size = len(data)
        if size <= self._plain_up_to:
            return self._format, data
        if size > self.max_bytes:
            raise ValueTooLarge(name, size, self.max_bytes)
        how = self._format
        if self.compress_above is not None and size > self.compress_above:
            compressed = _compress(data, self.compression)
            if len(compressed) < size:
                how, data = _HOW[how, self.compression], compressed
        return how, self._pickle.signed(data, how, name) if self._pickle else data

    def unpack(self, how: str, data: Buffer, name: str, type: Any = Any) -> Any:
        """The value that ``pack`` was given, whatever this codec's own format is.

        Arguments:
            how: what ``pack`` gave beside the bytes.
            data: the bytes.
            name: the full name of the Redis key they were found under.
            type: what the value is to be restored to. ``Any``: what the format has.

        Raises ``Undecodable``, and nothing else. Whether a type can be restored at all, ``check_type`` tells.
        """
        try:
            if how == "":
                return _decode_msgpack(data) if type is Any else _decoder("", type)(data)
            return self._unpacked(how, data, name, type)
        except Undecodable:
            raise
        except Exception as error:  # noqa: BLE001 - the bytes are foreign, and they decide what happens
            raise Undecodable(_reason(error)) from None

    def check_type(self, type: Any) -> None:
        """Raises ``TypeError`` for a type that no value of this codec's format can be restored to.

        For those who declare a type: to ``unpack``, such a type only ever means ``Undecodable``.
        """
        if not self._pickle:
            _decoder(self._format, type)

    def _unpacked(self, how: str, data: Buffer, name: str, kind: Any) -> Any:
        format, compression = _PARTS.get(how) or ("", "")
        if not format and not compression:
            raise Undecodable(f"no format of this version: {how[:40]!r}")
        if format == "pickle":
            if self._pickle is None:
                raise Undecodable("a pickle, and this codec has no secret to verify it with")
            data = self._pickle.verified(data, how, name)  # before anything is made of it
        if compression:
            data = _expand(data, compression, self.max_bytes)
        if format != "pickle":
            return _decoder(format, kind)(data)
        value = pickle.loads(data)  # noqa: S301 - signed by a holder of a secret
        if not _fits(value, kind):
            raise Undecodable(f"Expected `{kind}`, got `{type(value).__name__}`")
        return value

    def _why_not(self, value: object, error: Exception) -> str:
        reason = "it is nested too deeply, or contains itself" if isinstance(error, RecursionError) else str(error)
        return f"a {type(value).__name__} cannot be stored as {self._format or 'msgpack'}: {reason[:300]}"


def _reason(error: Exception) -> str:
    """What went wrong, without the stored value that some messages quote."""
    if isinstance(error, msgspec.ValidationError):
        said, at, where = str(error).partition(" - at ")
        return (
            (said if said.startswith(("Expected ", "Object missing ")) else "a value that its type refuses")
            + at
            + where
        )
    if isinstance(error, msgspec.MsgspecError | ImportError | AttributeError):
        return str(error)
    return type(error).__name__


def _check_format(format: object) -> None:
    if isinstance(format, str) and format.lower() == "pickle":
        raise ValueError("a pickle must be signed: give format=Pickle(secret), not 'pickle'")
    if isinstance(format, type) and issubclass(format, Pickle):
        raise TypeError("give format=Pickle(secret), not the class")
    _check_choice(format, _FORMATS, "format", ", or Pickle(secret)")


def _check_choice(chosen: object, choices: tuple[str, ...], what: str, more: str = "") -> None:
    if not isinstance(chosen, str):
        raise TypeError(f"{what} must be one of {choices}{more}; not {type(chosen).__name__}: {chosen!r}")
    if chosen not in choices:
        near = get_close_matches(chosen.lower(), choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {choices}{more}"
        raise ValueError(f"unknown {what} {chosen!r}; {hint}")


def _check_number(number: object, what: str, least: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{what} must be a whole number of bytes, not {type(number).__name__}: {number!r}")
    if number < least:
        raise ValueError(f"{what} must be {least} or more, not {number}")

"""Code that the fuzz targets of text share: a model's text side in its own processes, and the allowed outcomes."""

import asyncio
import atexit
import json
import pathlib
import tempfile
from collections.abc import Awaitable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cortex.wire.errors import ApiError
from neuron.text.pool import TextModel, TextPool

EOS = (0,)
NUM_TOKENS = 300


class Texts:
    """A pool of text processes, used from synchronous code."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.pool = TextPool()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-text-", dir="/dev/shm"))
        (self.folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
        atexit.register(self.close)

    def open(self) -> TextModel:
        """Open the model in ``folder``. Raises :class:`ApiError`."""
        return self.wait(self.pool.open(str(self.folder), NUM_TOKENS, EOS))  # type: ignore[no-any-return]

    def wait(self, work: Awaitable[object]) -> object:
        """Return what comes of ``work``."""

        async def awaited() -> object:
            return await work

        return self._loop.run_until_complete(awaited())

    def check(self, work: Awaitable[object], statuses: range = range(400, 500)) -> bool:
        """Return whether ``work`` succeeds; fail unless it does or is refused with one of ``statuses``."""
        try:
            self.wait(work)
        except ApiError as error:
            assert error.info().status in statuses, error.info()
            return False
        return True

    def close(self) -> None:
        """End the processes."""
        self._loop.run_until_complete(self.pool.stop())


def tokenizer() -> dict[str, object]:
    """Return a small byte-level ``tokenizer.json``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["</s>", *letters, "th", "the"]
    found = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [("t", "h"), ("th", "e")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["</s>"])
    state: dict[str, object] = json.loads(found.to_str())
    return state

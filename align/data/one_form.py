"""The rows of one source are all text or all conversations: a chat template would write the ones and not the others."""

from collections.abc import Iterable, Iterator

from align.data.schema import Row, is_messages, is_token_ids
from align.errors import UserError


def one_form(rows: Iterable[Row], *, turns: bool) -> Iterator[Row]:
    """The rows of a source, as long as their prompts are of one form; rows of weight 0 and of token ids are of any.

    Args:
        turns: whether the source reads plain texts as turns already.

    Raises:
        UserError: one is text and another a conversation; it names both and the key to set.

    Source: ours
    """
    form = Form("" if turns else "set `turns: true` for this source, so that texts are read as turns, or ")
    for row in rows:
        form.check(row)
        yield row


class Form:
    """Of a source: what its first rows are, text or conversations."""

    def __init__(self, remedy: str = "") -> None:
        """Args:
        remedy: what a user may do besides giving the two kinds apart.
        """
        self.remedy = remedy
        self.first: dict[bool, Row] = {}

    def check(self, row: Row) -> None:
        """Raises:
        UserError: it is of the other form than a row before it.
        """
        if row.loss_weight == 0 or is_token_ids(row.prompt):
            return
        self.first.setdefault(is_messages(row.prompt), row)
        if len(self.first) > 1:
            text, talk = self.first[False], self.first[True]
            raise UserError(
                f"{text.place}: the prompt is text, which no chat template writes, and that of {talk.place} is a "
                f"conversation, which one does; {self.remedy}give the two kinds of rows as two sources"
            )

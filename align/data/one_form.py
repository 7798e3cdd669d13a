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
    first: dict[bool, Row] = {}
    for row in rows:
        if row.loss_weight != 0 and not is_token_ids(row.prompt):
            first.setdefault(is_messages(row.prompt), row)
            if len(first) > 1:
                raise _mixed(first[False], first[True], turns=turns)
        yield row


def _mixed(text: Row, talk: Row, *, turns: bool) -> UserError:
    remedy = "" if turns else "set `turns: true` for this source, so that texts are read as turns, or "
    return UserError(
        f"{text.place}: the prompt is text, which no chat template writes, and that of {talk.place} is a conversation, "
        f"which one does; {remedy}give the two kinds of rows as two sources"
    )

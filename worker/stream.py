"""Chunks: a request's text as it comes, for the live topic.

Pure: makes the chunks; the service sends them outside transactions. A chunk is a preview, the completion is the truth.
"""

from schemas.results import Chunk
from worker.outcome import Answer


class Preview:
    """Numbers one answer's chunks."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        carried = [choice.num_chunks for choice in answer.admitted.carried]
        self.num_sent = carried or [0] * answer.admitted.request.sampling.num_choices  # of each choice, whoever did
        options = answer.admitted.generate.body.stream_options
        self._include_usage = options is not None and options.include_usage

    def chunk(self, choice: int, text: str) -> Chunk | None:
        """The chunk with this text, if there is anything to say: some text, or that the choice has ended.

        To be called with what `Answer.take` and `Answer.finish` return; several takes may be put together.
        """
        answer = self._answer
        reason = answer.finish_reason(choice)
        if not text and reason is None:
            return None
        sequence = self.num_sent[choice]
        self.num_sent[choice] += 1
        return Chunk(
            id=answer.id,
            custom_id=answer.admitted.generate.custom_id,
            choice=choice,
            sequence=sequence,
            text=text,
            finish_reason=reason,
            input=answer.admitted.input,
            worker=answer.worker,
            usage=answer.usage if self._include_usage and answer.done else None,
        )

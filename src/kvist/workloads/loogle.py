"""LooGLE: questions about long documents; all questions of a document share it as a prefix."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from kvist.model import Query
from kvist.workloads.base import UNIQUE, Filler, Workload, fit, poisson, text_tokens
from kvist.workloads.files import records

LENGTHS = (1024, 2048, 4096, 8192)
DOCUMENTS = 512
QUESTION = 64  # tokens of a generated question
ASKED = (4, 12)  # fewest and most questions of a generated document; LooGLE's mean is about 8

Document = tuple[bytes, list[bytes]]


class LooGLE(Workload):
    name = "loogle"
    description = "Long-document question answering; FILE: LooGLE's JSON lines."
    source = "paper section 4; bigai-nlco/LooGLE"
    params = {
        "documents": "documents (512, or what FILE gives), cut in turn to 1024, 2048, 4096, 8192 tokens",
        "output": "output tokens (4)",
    }

    def __init__(
        self,
        *,
        file: str | None = None,
        documents: int | None = None,
        output: int = 4,
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rate=12.0 if rate is None else rate, seed=seed)
        if (documents is not None and documents < 1) or output < 1:
            raise ValueError("loogle: documents and output must be at least 1")
        self.file = None if file is None else Path(file)
        self.exactly = documents is not None
        self.documents = DOCUMENTS if documents is None else documents
        self.output = output

    def describe(self) -> str:
        if self.file is None:
            return f"loogle, generated, no file was given: {self.documents} documents"
        return (
            f"loogle, from {self.file.name}: up to {self.documents} documents (a long one gives several, cut "
            "one after the other)"
        )

    def __iter__(self) -> Iterator[Query]:
        rng = Random(f"{self.seed}/loogle")
        documents = self._generated(rng) if self.file is None else self._loaded(self.file)
        pairs = [(d, question) for d, (_, asked) in enumerate(documents) for question in asked]
        rng.shuffle(pairs)
        assert self.rate is not None
        before, between = text_tokens("Input: "), text_tokens(" Question: ")
        arrivals = poisson(self.rate, rng)
        for number, ((d, question), arrival) in enumerate(zip(pairs, arrivals, strict=False)):
            prompt = before + documents[d][0] + between + question
            yield Query(number, prompt, self.output, arrival, session=f"document{d}")

    def _generated(self, rng: Random) -> list[Document]:
        filler = Filler(self.seed)
        number = iter(range(UNIQUE, 2 * UNIQUE))
        return [
            (
                filler.piece(d, LENGTHS[d % len(LENGTHS)]),
                [filler.piece(next(number), QUESTION) for _ in range(rng.randint(*ASKED))],
            )
            for d in range(self.documents)
        ]

    def _loaded(self, path: Path) -> list[Document]:
        """Cut the file's documents, window after window, until there are enough."""
        texts = [
            (text_tokens(text), [text_tokens(q) for q in asked])
            for number, row in records(path)
            for text, asked in [_document(row, f"{path}:{number}")]
        ]
        documents: list[Document] = []
        offsets = [0] * len(texts)
        while len(documents) < self.documents:
            before = len(documents)
            for i, (text, asked) in enumerate(texts):
                length = LENGTHS[len(documents) % len(LENGTHS)]
                piece = text[offsets[i] : offsets[i] + 4 * length]
                if not piece or not asked or len(documents) == self.documents:
                    continue
                documents.append((fit(piece, length), asked))
                offsets[i] += 4 * length
            if len(documents) == before and not self.exactly and documents:
                break
            if len(documents) == before:
                raise ValueError(
                    f"{path}: its text gives only {before} documents, not {self.documents}: "
                    f"use loogle:{path}:documents={before}"
                )
        return documents


def _document(row: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """Text and questions of a record: `input` or `context`, with `qa`, `qa_pairs` or `question`."""
    text = row.get("input") or row.get("context")
    if not isinstance(text, str):
        raise ValueError(f"{where}: field 'input' (or 'context') with the document's text is missing")
    pairs = row.get("qa") or row.get("qa_pairs")
    if isinstance(pairs, str):
        pairs = _parse(pairs, where)
    if pairs is None and isinstance(row.get("question"), str):
        pairs = [[row["question"]]]
    if not isinstance(pairs, list):
        raise ValueError(f"{where}: field 'qa' or 'qa_pairs' (a list) or 'question' is missing")
    asked = [pair.get("Q") if isinstance(pair, dict) else pair[0] if pair else None for pair in pairs]
    if not all(isinstance(question, str) for question in asked):
        raise ValueError(f"{where}: each pair needs a question (first entry, or field 'Q')")
    return text, [str(question) for question in asked]


def _parse(pairs: str, where: str) -> Any:
    """The hub's files keep qa_pairs as the text of a list, as JSON or as a Python literal."""
    try:
        return msgspec.json.decode(pairs)
    except msgspec.DecodeError:
        try:
            return ast.literal_eval(pairs)
        except (ValueError, SyntaxError):
            raise ValueError(f"{where}: field 'qa_pairs' is neither JSON nor a Python list") from None

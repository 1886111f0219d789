"""Many shots: sentences with labels of our own; every question is another sentence, whose label is to be found.

SCBench's many-shot in-context learning (arXiv 2412.10319) without data: the label is made up and goes by who acts in
the sentence, so that it can be learnt from the text alone. Chance is right in one of LABELS cases.
"""

from __future__ import annotations

from itertools import islice

from fastkv.eval.example import Draw, Example, contains_all
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.archive_text import OBJECTS, PLACES, SUBJECTS, VERBS
from fastkv.eval.tasks.haystack import Pieces, different
from fastkv.eval.tasks.words import made_up
from fastkv.eval.turns.talk import Family, Talk, Turn

LABELS = 4
ANSWER = 10  # tokens, as in SCBench

INTRO = "Every sentence below has a label. Learn which label belongs to which: more sentences follow.\n\n"


def write(draw: Draw, questions: int) -> Talk:
    rng = draw.rng()
    labels = made_up(rng).first(LABELS)
    order = rng.sample(SUBJECTS, len(SUBJECTS))
    label_of = {subject: labels[place % LABELS] for place, subject in enumerate(order)}
    sentences = different(lambda: (rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS), rng.choice(PLACES)))
    asked = list(islice(sentences, questions))
    # Everyone who is asked about is shown at least once: in the first shots, whatever the length.
    needed = iter(list(dict.fromkeys(subject for subject, *_ in asked)))

    def shot() -> str:
        subject, *rest = next(sentences)
        subject = next(needed, subject)
        return f"Sentence: {' '.join((subject, *rest))}.\nLabel: {label_of[subject]}"

    shots, first = Pieces(shot), len({subject for subject, *_ in asked})
    turns = tuple(_turn(" ".join(words), label_of[words[0]]) for words in asked)

    def build(n: int) -> Talk:
        listed = shots.first(first + n)
        draw.rng("order").shuffle(listed)
        return Talk(INTRO + "\n\n".join(listed), (), turns=turns)

    return fit(draw, build)


def _turn(sentence: str, label: str) -> Turn:
    asked = Example(f"\n\nSentence: {sentence}.", (label,), "\nLabel:")
    return Turn(asked, f" {label}", contains_all, ANSWER)


FAMILY = Family("many_shot", f"the label of a sentence, one of {LABELS}, from many examples", write)

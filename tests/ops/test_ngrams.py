"""TfIdfVectorizer of numbers against onnxruntime; what its attributes must not ask for."""

import numpy as np
import pytest

from .harness import Compiled, case, check

TEXT = np.array([[1, 2, 3, 5, 3, 2], [2, 3, 2, 3, 2, 3], [7, 7, 5, 5, 6, 6]])
POOL = {
    "pool_int64s": [2, 3, 7, 2, 3, 5, 3, 6, 6, 2, 3, 5],  # three 1-grams, three 2-grams, one 3-gram
    "ngram_counts": [0, 3, 9],
    "ngram_indexes": [3, 0, 1, 6, 2, 5, 4],
}
WEIGHTS = [float(w) for w in np.linspace(0.5, 2.0, 7, dtype=np.float32)]


def ngrams(x, low, high, skips, label="", **options):
    options = {"mode": "TF", **POOL, **options}
    return case(
        "TfIdfVectorizer", x, min_gram_length=low, max_gram_length=high, max_skip_count=skips, label=label, **options
    )


CASES = [
    ngrams(TEXT, 1, 3, 0),
    ngrams(TEXT, 1, 3, 4, "skips"),
    ngrams(TEXT.astype(np.int32), 2, 2, 1, "pairs", dims={0: ("n", "c")}),
    ngrams(TEXT[0], 1, 1, 3, "row"),
    ngrams(TEXT, 1, 2, 1, "idf", mode="IDF", weights=WEIGHTS),
    ngrams(TEXT, 1, 2, 1, "tfidf", mode="TFIDF", weights=WEIGHTS),
    ngrams(TEXT[:, :2], 3, 3, 0, "short"),
]
REFUSED = ngrams(TEXT, 1, 1, 0, ngram_indexes=[0, 1, -2, 3, 4, 5, 6])


@pytest.fixture(scope="module")
def compiled():
    return Compiled([*CASES, REFUSED])


@pytest.mark.parametrize("c", CASES, ids=str)
def test_ngrams(compiled, c):
    check(compiled, c)


def test_a_place_outside_of_the_output(compiled):
    assert "ngram_indexes has -2" in str(compiled.errors[id(REFUSED)])

"""Files that are hostile before they are models: broken framing, and more of everything than memory can hold."""

from __future__ import annotations

from pathlib import Path

from tests.security.kinds import kind
from tests.security.wire import (
    ATTRIBUTE,
    FUNCTIONS,
    GRAPH,
    INITIALIZER,
    INPUT,
    NODE,
    OPSET,
    field,
    head,
    hollow,
    model,
    nested,
    number,
    varint,
    written,
)

NO_MODEL = "not an ONNX model, or a truncated one"
RELU = field(NODE, field(1, b"x") + field(2, b"y") + field(4, b"Relu"))
X = field(INPUT, field(1, b"x") + field(2, field(1, number(1, 1) + field(2, field(1, number(1, 4))))))
Y = field(12, field(1, b"y"))


@kind(NO_MODEL)
def empty_file(folder: Path) -> Path:
    return written(folder, b"")


@kind(NO_MODEL)
def git_lfs_pointer(folder: Path) -> Path:
    return written(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@kind(NO_MODEL)
def web_page(folder: Path) -> Path:
    return written(folder, b"<!doctype html><title>404</title>")


@kind(NO_MODEL)
def zeros(folder: Path) -> Path:
    return written(folder, b"", 2**20)


@kind(NO_MODEL)
def two_gigabytes_of_nothing(folder: Path) -> Path:
    return written(folder, b"", 2**31 - 1)


@kind("bytes are more than an ONNX file may have")
def three_gigabytes(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y), 3 << 30)


@kind(NO_MODEL)
def ones(folder: Path) -> Path:
    return written(folder, b"\xff" * 100_000)


@kind(NO_MODEL)
def cut_in_the_middle(folder: Path) -> Path:
    content = model(X + RELU + Y)
    return written(folder, content[: len(content) // 2])


@kind(NO_MODEL)
def length_past_the_end(folder: Path) -> Path:
    return written(folder, number(1, 8) + head(GRAPH, 2**62) + b"x")


@kind(NO_MODEL)
def endless_number(folder: Path) -> Path:
    return written(folder, number(1, 8) + b"\x28" + b"\x80" * 100_000)


@kind(NO_MODEL)
def group(folder: Path) -> Path:
    return written(folder, number(1, 8) + b"\x3b" * 100_000)


@kind(NO_MODEL)
def wire_type_of_the_future(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y, b"\x0f"))


@kind(NO_MODEL)
def field_zero(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y, b"\x02\x00"))


@kind(NO_MODEL)
def no_graph(folder: Path) -> Path:
    return written(folder, number(1, 8) + field(OPSET, number(2, 17)))


@kind(NO_MODEL)
def no_opset(folder: Path) -> Path:
    return written(folder, number(1, 8) + field(GRAPH, X + RELU + Y))


@kind(NO_MODEL)
def no_ir_version(folder: Path) -> Path:
    return written(folder, field(GRAPH, X + RELU + Y) + field(OPSET, number(2, 17)))


@kind("subgraphs nest more than 30 deep")
def graphs_in_graphs(folder: Path) -> Path:
    return written(folder, model(nested([NODE, ATTRIBUTE, 6], 31)))


@kind("subgraphs nest more than 30 deep")
def graphs_that_overflow_a_stack(folder: Path) -> Path:
    return written(folder, model(nested([NODE, ATTRIBUTE, 6], 50_000)))


@kind("subgraphs nest more than 30 deep")
def graph_lists_in_graphs(folder: Path) -> Path:
    return written(folder, model(nested([NODE, ATTRIBUTE, 11], 1000)))


@kind("messages nest more than 98 deep")
def sequences_of_sequences(folder: Path) -> Path:
    return written(folder, model(field(INPUT, field(2, nested([4, 1], 50_000)))))


@kind("messages nest more than 98 deep")
def optionals_in_a_function(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y, field(FUNCTIONS, field(12, field(2, nested([9, 1], 100))))))


@kind("more than 250000 nodes")
def a_million_nodes(folder: Path) -> Path:
    return written(folder, model(field(NODE, b"") * 1_000_000))


@kind("more than 250000 nodes")
def a_million_nodes_in_a_function(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y, field(FUNCTIONS, field(7, b"") * 1_000_000)))


@kind("more than 1000000 fields")
def two_million_initializers(folder: Path) -> Path:
    return written(folder, model(field(INITIALIZER, b"") * 2_000_000))


@kind("more than 1000000 fields")
def two_million_opsets(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y, field(OPSET, b"") * 2_000_000))


@kind("more than 1000000 fields")
def two_million_names(folder: Path) -> Path:
    return written(folder, model(field(NODE, field(1, b"x") * 2_000_000)))


@kind("more than 1000000 fields")
def two_million_numbers_in_an_attribute(folder: Path) -> Path:
    return written(folder, model(field(NODE, field(ATTRIBUTE, number(8, 1) * 2_000_000))))


@kind("more than 1000000 fields")
def two_million_dimensions(folder: Path) -> Path:
    return written(folder, model(field(INITIALIZER, number(1, 1) * 2_000_000)))


@kind("more than 64 MiB of integers outside of raw_data")
def packed_integers(folder: Path) -> Path:
    return hollow(folder, [GRAPH, NODE, ATTRIBUTE, 8], 65 << 20)


@kind("more than 64 MiB of integers outside of raw_data")
def packed_dimensions(folder: Path) -> Path:
    return hollow(folder, [GRAPH, INITIALIZER, 1], 1 << 30)


@kind("a text of 1073741824 bytes is longer than 16 MiB")
def a_string_of_a_gigabyte(folder: Path) -> Path:
    return hollow(folder, [GRAPH, NODE, ATTRIBUTE, 4], 1 << 30)


@kind("a text of 1073741824 bytes is longer than 16 MiB")
def a_comment_of_a_gigabyte(folder: Path) -> Path:
    return hollow(folder, [GRAPH, NODE, 6], 1 << 30)


@kind("a text of 1073741824 bytes is longer than 16 MiB")
def an_unknown_field_of_a_gigabyte(folder: Path) -> Path:
    return hollow(folder, [GRAPH, 1000], 1 << 30)


def named(name: bytes) -> bytes:
    return model(X + field(NODE, field(1, b"x") + field(2, b"y") + field(3, name) + field(4, b"Relu")) + Y)


@kind("is longer than 4096 characters")
def a_name_of_a_megabyte(folder: Path) -> Path:
    return written(folder, named(b"n" * 2**20))


@kind("holds control characters")
def a_name_that_moves_the_cursor(folder: Path) -> Path:
    return written(folder, named(b"\x1b[2J\x1b[H done"))


@kind("holds control characters")
def a_name_of_two_lines(folder: Path) -> Path:
    return written(folder, named(b"n\nllmc: everything is fine"))


@kind("holds control characters")
def a_name_that_turns_text_around(folder: Path) -> Path:
    return written(folder, named("n\u202egnp.xe".encode()))


@kind("a name in it is not text")
def a_name_that_is_no_text(folder: Path) -> Path:
    return written(folder, named(b"\xff\xfe"))


@kind("opset")
def an_opset_of_the_far_future(folder: Path) -> Path:
    return written(folder, number(1, 8) + field(GRAPH, X + RELU + Y) + field(OPSET, number(2, 2**62)))


@kind("opset")
def a_negative_opset(folder: Path) -> Path:
    return written(folder, number(1, 8) + field(GRAPH, X + RELU + Y) + field(OPSET, number(2, -17)))


@kind("two versions of domain 'ai.onnx'")
def two_opsets(folder: Path) -> Path:
    return written(folder, model(X + RELU + Y, field(OPSET, field(1, b"ai.onnx") + number(2, 13))))


@kind("impossible shape")
def a_rank_of_100000(folder: Path) -> Path:
    return written(
        folder, model(X + RELU + Y + field(INITIALIZER, field(1, varint(1) * 100_000) + number(2, 1) + field(8, b"w")))
    )

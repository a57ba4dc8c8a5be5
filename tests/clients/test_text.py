"""Raw text in: embeddings, classes and rerank scores of encoder models, beside what transformers gives for them."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, HTTP, HTTP_AIO
from encoders import (
    AGREEMENT,
    NAMES,
    TABLE,
    VOCABULARY,
    MiniLm,
    add,
    add_minilm,
    as_text,
    check_answers,
    check_close,
    check_same_direction,
    cosine_distances,
    cut,
    expected,
    in_shards,
    masked,
    onnx_body,
    texts_of,
    tokens_of,
    with_config,
    with_file,
    with_weights,
    without,
)
from infer import WAYS, Question, ask
from models import Repository, save
from server import Server
from tensors import Tensor, tensor
from wire import call

# The large model on a busy core, built without optimization.
pytestmark = pytest.mark.timeout(300)

REFERENCE = MiniLm()
WIDTH, LIMIT = 24, 64
CHUNK = 25
SEPARATOR = 3

def with_onnx(folder):
    (folder / "onnx").mkdir()
    save(onnx_body(), folder / "onnx" / "model.onnx")


def with_onnx_alone(folder):
    with_onnx(folder)
    (folder / "model.safetensors").unlink()
    # Otherwise the files say how wide an embedding is.
    with_config(hidden_size=8)(folder)


def prefixed(tensors):
    """As in a model for masked words: the body under a name of its own, and something else beside it."""
    named = {f"bert.{name}": array for name, array in tensors.items()}
    return named | {"cls.predictions.bias": np.zeros(VOCABULARY, "<f4")}


def halved(tensors):
    return {name: array.astype("<f2") for name, array in tensors.items()}


SENTENCE_FILES = [
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
]

# Name → the checkpoint that it is, its settings, and what is other about its files.
VARIANTS = {
    "prefixed": ("bert-mean", "", with_weights(prefixed, {"architectures": ["BertForMaskedLM"]})),
    "sharded": ("roberta", "", in_shards),
    "halved": ("distilbert", "", with_weights(halved)),
    "plain": ("distilbert", "", without(*SENTENCE_FILES)),
    "strict": ("bert-mean", "[text]\ntruncate = false", None),
    "shorter": ("bert-mean", "[text]\nmax_length = 16", None),
    "prompted": ("bert-mean", '[text]\nprompt = "the boat "', None),
    "normalized": ("bert-cls", "[text]\nnormalize = true", None),
    "pooled": ("bert-cls", '[text]\npooling = "mean"\nnormalize = true', None),
    "unmodified": ("bert-cls", "", None),
    "onnx": ("bert-mean", "", with_onnx_alone),
    "both": ("bert-cls", "", with_onnx),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("texts")
    repository = Repository(home / "models")
    add_minilm(repository)
    add_minilm(repository, "minilm-512", "[text]\nmax_length = 512\n")
    for name in NAMES:
        add(repository, name)
    for name, (checkpoint, settings, change) in VARIANTS.items():
        add(repository, name, checkpoint, settings, change)
    with Server(repository.path, home) as running:
        index = call(running.rest, "POST", "/v2/repository/index").json()
        assert [each for each in index if each["state"] != "READY"] == []
        yield running
        assert running.stop() == 0, running.tail()


@pytest.fixture(params=[HTTP, GRPC], ids=["http", "grpc"])
def client(request, server):
    with request.param.connect(server) as client:
        yield client


def embeddings(client, model, texts):
    return client.infer(model, {"text": as_text(texts)}).as_numpy("embedding")


# --- all-MiniLM-L6-v2 ---------------------------------------------------------------


def check_minilm(found, places, what=""):
    wanted = REFERENCE.embeddings[places]
    check_close(found, wanted, what)
    check_same_direction(found, wanted, what)


def test_two_hundred_texts_in_one_request(client):
    """Of all lengths in no order, so that they run in parts and are put together again."""
    found = embeddings(client, "minilm", REFERENCE.texts)
    check_minilm(found, list(range(len(REFERENCE.texts))))


def test_their_tokens_instead(client):
    places = REFERENCE.by_length()[::2]
    for start in range(0, len(places), CHUNK):
        chunk = places[start : start + CHUNK]
        result = client.infer("minilm", masked([REFERENCE.ids[place] for place in chunk]))
        check_minilm(result.as_numpy("embedding"), chunk)


def test_more_tokens_than_are_taken_of_a_text(server):
    with GRPC.connect(server) as client:
        assert max(len(ids) for ids, _ in REFERENCE.longer) == 512
        for ids, wanted in REFERENCE.longer:
            result = client.infer("minilm", {"input_ids": np.array([ids])})
            check_close(result.as_numpy("embedding"), [wanted], f"{len(ids)} tokens")


def test_a_longer_limit(server):
    """The model's positions reach further than its files let texts go."""
    with GRPC.connect(server) as client:
        found = embeddings(client, "minilm-512", REFERENCE.longer_texts)
    wanted = [embedding for _, embedding in REFERENCE.longer]
    check_close(found, wanted)
    check_same_direction(found, wanted)


def test_alone_and_beside_others(server):
    """By itself, among others in one request, and in requests that run together."""
    places = REFERENCE.by_length()[::5]
    texts = [REFERENCE.texts[place] for place in places]
    with GRPC.connect(server) as client:
        alone = np.concatenate([embeddings(client, "minilm", [text]) for text in texts])
        check_close(embeddings(client, "minilm", texts), alone, "in one request", AGREEMENT)
        tokens = client.infer("minilm", masked([REFERENCE.ids[place] for place in places]))
        check_close(tokens.as_numpy("embedding"), alone, "as tokens", AGREEMENT)
    check_minilm(alone, places)
    with HTTP_AIO.connect(server) as client:
        calls = [client.request("minilm", {"text": as_text([text])}) for text in texts]
        together = [result.as_numpy("embedding")[0] for result in client.raw.together("infer", calls)]
    check_close(together, alone, "at one time", AGREEMENT)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_vectors(server, way):
    places = REFERENCE.by_length()[:120:4]
    texts = [REFERENCE.texts[place] for place in places]
    answer = ask(server, way, "minilm", tensor("text", "BYTES", [len(texts)], texts))
    (output,) = answer.outputs.values()
    assert (output.name, output.datatype, output.shape) == ("embedding", "FP32", [len(texts), 384])
    check_minilm(np.reshape(output.data, output.shape), places, way)


# --- every architecture and head ----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_small_models(client, name):
    wanted = expected(name)
    cases = wanted["cases"]
    by_text = client.infer(name, {"text": texts_of(cases)})
    check_answers(by_text, wanted, cases, "all texts")
    by_tokens = client.infer(name, tokens_of(cases))
    check_answers(by_tokens, wanted, cases, "all tokens")
    check_close(by_tokens.as_numpy(wanted["kind"]), by_text.as_numpy(wanted["kind"]), "tokens or text", AGREEMENT)
    alone = []
    for case in cases:
        result = client.infer(name, {"text": texts_of([case])})
        check_answers(result, wanted, [case], f"{texts_of([case])!r} alone")
        alone.append(result.as_numpy(wanted["kind"])[0])
        # Without a mask all of it is text.
        tokens = tokens_of([case])
        del tokens["attention_mask"]
        check_answers(client.infer(name, tokens), wanted, [case], "tokens alone")
    check_close(by_text.as_numpy(wanted["kind"]), alone, "alone or not", AGREEMENT)


@pytest.mark.parametrize("name", NAMES)
def test_metadata(client, name):
    wanted = expected(name)
    kind = wanted["kind"]
    metadata = client.describe("get_model_metadata", name)
    assert metadata["platform"] == "candle_safetensors"
    inputs = [declared(each) for each in metadata["inputs"]]
    assert inputs[:2] == [
        ("text", "BYTES", [-1, 2] if kind == "rerank_score" else [-1]),
        ("input_ids", "INT64", [-1, -1]),
    ]
    others = ["attention_mask", "token_type_ids"] if "token_type_ids" in wanted["cases"][0] else ["attention_mask"]
    assert sorted(inputs[2:]) == [(other, "INT64", [-1, -1]) for other in others]
    outputs = {
        "embedding": [("embedding", "FP32", [-1, WIDTH])],
        "scores": [("label", "BYTES", [-1]), ("scores", "FP32", [-1, len(wanted.get("labels", []))])],
        "rerank_score": [("rerank_score", "FP32", [-1])],
    }
    assert [declared(each) for each in metadata["outputs"]] == outputs[kind]
    config = client.describe("get_model_config", name)
    config = config.get("config", config)
    assert all(each.get("optional") is True for each in config["input"])


def declared(each):
    return each["name"], each["datatype"], [int(size) for size in each["shape"]]


def test_one_output_of_two(client):
    wanted = expected("bert-classification")
    cases = wanted["cases"]
    for name in ("scores", "label"):
        result = client.infer("bert-classification", {"text": texts_of(cases)}, outputs=[name])
        assert (result.as_numpy("scores") is None) is (name != "scores")
        assert (result.as_numpy("label") is None) is (name != "label")


def test_pairs_may_be_classified_too(client):
    """A reranker with the same tokenizer tells the tokens that the pairs are."""
    cases = expected("bert-reranker")["cases"]
    by_tokens = client.infer("bert-classification", tokens_of(cases))
    by_text = client.infer("bert-classification", {"text": texts_of(cases)})
    check_close(by_text.as_numpy("scores"), by_tokens.as_numpy("scores"), tolerance=AGREEMENT)


# --- other files, other settings ----------------------------------------------------


@pytest.mark.parametrize("name", ["prefixed", "sharded", "plain"])
def test_other_files_of_the_same_model(client, name):
    wanted = expected(VARIANTS[name][0])
    cases = wanted["cases"]
    check_answers(client.infer(name, {"text": texts_of(cases)}), wanted, cases)


def test_halves_on_disk(client):
    cases = expected("distilbert")["cases"]
    found = client.infer("halved", {"text": texts_of(cases)}).as_numpy("embedding")
    check_same_direction(found, [case["embedding"] for case in cases], most=1e-3)


def test_a_shorter_limit(client):
    longest = expected("bert-mean")["cases"][-1]
    shorter = [*longest["input_ids"][:15], SEPARATOR]
    wanted = client.infer("bert-mean", masked([shorter])).as_numpy("embedding")
    check_close(embeddings(client, "shorter", [longest["text"]]), wanted, tolerance=AGREEMENT)


def test_a_prompt(client):
    wanted = embeddings(client, "bert-mean", ["the boat waits", "the boat "])
    check_close(embeddings(client, "prompted", ["waits", ""]), wanted, tolerance=AGREEMENT)


def test_normalization_and_pooling_by_settings(client):
    texts = [case["text"] for case in expected("bert-cls")["cases"]]
    given = embeddings(client, "bert-cls", texts)
    lengths = np.linalg.norm(given, axis=1)
    assert np.abs(lengths - 1).min() > 0.1, "the model normalizes by itself"
    check_close(embeddings(client, "normalized", texts), given / lengths[:, None], tolerance=AGREEMENT)
    pooled = embeddings(client, "pooled", texts)
    check_close(np.linalg.norm(pooled, axis=1), np.ones(len(texts)), tolerance=AGREEMENT)
    assert cosine_distances(pooled, given).max() > 0.01, "the mean is the first token's"


def test_a_limit_that_is_kept(client):
    """What need not be cut is answered as ever, to the last token that there is room for."""
    wanted = expected("bert-mean")
    cases = [case for case in wanted["cases"] if len(case["input_ids"]) < wanted["limit"]]
    check_answers(client.infer("strict", {"text": texts_of(cases)}), wanted, cases)
    full = "tide " * 7 + "a a"
    assert embeddings(client, "strict", [full]).shape == (1, WIDTH)
    with pytest.raises(InferenceServerException, match="33 tokens"):
        embeddings(client, "strict", [f"{full} a"])


def test_a_graph_of_onnx_takes_text_too(client):
    cases = expected("bert-mean")["cases"]
    wanted = np.stack([TABLE[case["input_ids"]].mean(axis=0) for case in cases])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert client.describe("get_model_metadata", "onnx")["platform"] == "onnxruntime_onnx"
    check_close(client.infer("onnx", {"text": texts_of(cases)}).as_numpy("embedding"), wanted)
    check_close(client.infer("onnx", tokens_of_onnx(cases)).as_numpy("embedding"), wanted)


def tokens_of_onnx(cases):
    tokens = tokens_of(cases)
    del tokens["token_type_ids"]
    return tokens


def test_onnx_is_chosen_where_both_are(client):
    cases = expected("bert-cls")["cases"]
    assert client.describe("get_model_metadata", "both")["platform"] == "onnxruntime_onnx"
    wanted = np.stack([TABLE[case["input_ids"][0]] for case in cases])
    check_close(client.infer("both", {"text": texts_of(cases)}).as_numpy("embedding"), wanted)


# --- what cannot be answered --------------------------------------------------------


def ids(*rows):
    return np.array(rows, dtype=np.int64)


SENTENCE = as_text(["the boat waits"])
LONG_TEXT = as_text(["the boat waits", "tide " * 40])

# Name → the model, the inputs, and what the error must say.
REFUSED = {
    "both": ("bert-mean", {"text": SENTENCE, "input_ids": ids([2, 5, 3])}, ["text", "the others"]),
    "text and mask": ("bert-mean", {"text": SENTENCE, "attention_mask": ids([1, 1])}, ["text", "the others"]),
    "mask alone": ("bert-mean", {"attention_mask": ids([1, 1])}, ["text", "input_ids"]),
    "too long": ("strict", {"text": LONG_TEXT}, ["text", "row 1", "162 tokens", "32"]),
    "no texts": ("bert-mean", {"text": as_text([])}, ["text"]),
    "no pairs": ("bert-reranker", {"text": np.empty([0, 2], np.object_)}, ["text"]),
    "no scalar": ("bert-mean", {"text": np.array("tide", np.object_)}, ["text", "[-1]"]),
    "pairs to embed": ("bert-mean", {"text": as_text([["a", "b"]])}, ["text", "[-1]", "[1, 2]"]),
    "three to rerank": ("bert-reranker", {"text": as_text([["a", "b", "c"]])}, ["text", "[-1, 2]", "[1, 3]"]),
    "one to rerank": ("xlm-roberta-reranker", {"text": as_text(["a", "b"])}, ["text", "[-1, 2]", "[2]"]),
    "three to classify": ("roberta-multilabel", {"text": as_text([["a", "b", "c"]])}, ["text", "[1, 3]"]),
    "text as numbers": ("bert-mean", {"text": np.float32([1])}, ["text", "BYTES", "FP32"]),
    "ids as numbers": ("bert-mean", {"input_ids": np.float32([[1, 2]])}, ["input_ids", "INT64", "FP32"]),
    "unknown input": ("bert-mean", {"texts": SENTENCE}, ["text"]),
    "unknown id": ("bert-mean", {"input_ids": ids([2, 5, 3], [2, VOCABULARY, 3])}, ["input_ids", "180"]),
    "negative id": ("modernbert", {"input_ids": ids([1, -1, 2])}, ["input_ids", "-1"]),
    "huge id": ("roberta", {"input_ids": ids([0, 1 << 40, 2])}, ["input_ids", str(1 << 40)]),
    "too many ids": ("bert-mean", {"input_ids": ids([5] * (LIMIT + 1))}, ["input_ids", "65", "64"]),
    "too many of roberta": ("roberta", {"input_ids": ids([5] * (LIMIT + 1))}, ["input_ids", "65", "64"]),
    "no ids": ("bert-mean", {"input_ids": np.empty([1, 0], np.int64)}, ["input_ids"]),
    "no rows": ("distilbert", {"input_ids": np.empty([0, 3], np.int64)}, ["input_ids"]),
    "flat ids": ("bert-mean", {"input_ids": np.array([2, 5, 3])}, ["input_ids", "[-1, -1]", "[3]"]),
    "mask of another length": (
        "bert-mean",
        {"input_ids": ids([2, 5, 3]), "attention_mask": ids([1, 1])},
        ["attention_mask", "input_ids"],
    ),
    "mask of more rows": (
        "bert-mean",
        {"input_ids": ids([2, 5, 3]), "attention_mask": ids([1, 1, 1], [1, 1, 1])},
        ["attention_mask"],
    ),
    "mask of twos": (
        "bert-mean",
        {"input_ids": ids([2, 5, 3]), "attention_mask": ids([1, 2, 1])},
        ["attention_mask", "2"],
    ),
    # A graph would say nothing of these, or name its own nodes.
    "unknown id of onnx": ("onnx", {"input_ids": ids([2, VOCABULARY, 3])}, ["input_ids", "180"]),
    "negative id of onnx": ("onnx", {"input_ids": ids([2, -1, 3])}, ["input_ids", "-1"]),
    "mask of another length of onnx": (
        "onnx",
        {"input_ids": ids([2, 5, 3]), "attention_mask": ids([1, 1])},
        ["attention_mask"],
    ),
    "mask of more rows of onnx": (
        "onnx",
        {"input_ids": ids([2, 5, 3]), "attention_mask": ids([1, 1, 1], [1, 1, 1])},
        ["attention_mask"],
    ),
    "types of threes": (
        "bert-mean",
        {"input_ids": ids([2, 5, 3]), "token_type_ids": ids([0, 3, 0])},
        ["token_type_ids", "3"],
    ),
    "types of roberta": (
        "roberta",
        {"input_ids": ids([0, 5, 2]), "token_type_ids": ids([0, 0, 0])},
        ["token_type_ids"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(client, name):
    model, inputs, said = REFUSED[name]
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs)
    assert caught.value.status() == client.kit.status("invalid_argument"), caught.value.message()
    for word in said:
        assert word in caught.value.message()


@pytest.mark.parametrize("way", ["rest_binary", "grpc_raw", "grpc_typed"])
@pytest.mark.parametrize("bad", [b"\xff\xfe", b"half \xf0\x9f", b"\xed\xa0\x80"], ids=["none", "half", "surrogate"])
def test_text_that_is_no_utf8(server, way, bad):
    given = Tensor("text", "BYTES", [2], [b"the boat", bad])
    answer = WAYS[way](server, Question("bert-mean", [given]))
    assert answer.status in (400, "INVALID_ARGUMENT")
    for word in ("text", "row 1", "UTF-8"):
        assert word in answer.error


@pytest.mark.parametrize("way", WAYS)
def test_nothing_given(server, way):
    answer = WAYS[way](server, Question("bert-mean", []))
    assert answer.status in (400, "INVALID_ARGUMENT")
    assert "input" in answer.error


def test_a_bad_request_harms_no_other(server):
    """Even where both come at one time."""
    cases = expected("bert-mean")["cases"]

    def bad():
        with pytest.raises(InferenceServerException, match="input_ids"):
            client.infer("bert-mean", {"input_ids": ids([2, VOCABULARY, 3])})

    with GRPC.connect(server) as client, ThreadPoolExecutor(2 * len(cases)) as pool:
        refused = [pool.submit(bad) for _ in cases]
        answers = [pool.submit(client.infer, "bert-mean", {"text": texts_of([case])}) for case in cases]
        for case, answer in zip(cases, answers, strict=True):
            check_answers(answer.result(), {"kind": "embedding"}, [case])
        for each in refused:
            each.result()


# --- what cannot be served ----------------------------------------------------------


def drop(name):
    return with_weights(lambda tensors: {each: array for each, array in tensors.items() if each != name})


def replace(name, make):
    return with_weights(lambda tensors: tensors | {name: make(tensors[name])})


def pooling(**modes):
    return with_file("1_Pooling/config.json", {"word_embedding_dimension": WIDTH} | modes)


def modules(*pairs):
    """The transformer, and what else."""
    listed = [("", "Transformer"), *pairs]
    return with_file(
        "modules.json",
        [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for at, (path, kind) in enumerate(listed)
        ],
    )


def changes(*steps):
    return lambda folder: [step(folder) for step in steps]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shards(places):
    index = with_file("model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return changes(without("model.safetensors"), index)


BERT, CLASSES = "bert-mean", "bert-classification"
LAST_DENSE = "encoder.layer.1.output.dense.weight"
WORDS = "embeddings.word_embeddings.weight"
SUPPORTED = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert"]

# Name → the checkpoint, its settings, what is wrong with its files, and what the reason must say.
FAILING = {
    "no_tokenizer": (BERT, "", without("tokenizer.json"), ["tokenizer.json"]),
    "broken_tokenizer": (BERT, "", with_file("tokenizer.json", "{"), ["tokenizer.json"]),
    "other_tokenizer": (BERT, "", with_file("tokenizer.json", {"model": {"type": "Magic"}}), ["tokenizer.json"]),
    "no_config": (BERT, "", without("config.json"), ["config.json"]),
    "broken_config": (BERT, "", with_file("config.json", "{"), ["config.json"]),
    "cut_weights": (BERT, "", cut("model.safetensors", -5), ["model.safetensors", "truncated"]),
    "cut_header": (BERT, "", cut("model.safetensors", 500), ["model.safetensors", "truncated"]),
    "no_weights": (BERT, "", cut("model.safetensors", 0), ["model.safetensors"]),
    "endless_header": (
        BERT,
        "",
        with_file("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
        ["model.safetensors", "header"],
    ),
    "wrong_header": (BERT, "", with_file("model.safetensors", struct.pack("<Q", 2) + b"[}"), ["model.safetensors"]),
    "missing_tensor": (BERT, "", drop(LAST_DENSE), [LAST_DENSE, "missing"]),
    "wrong_shape": (BERT, "", replace(WORDS, lambda array: array[:100]), [WORDS, "[180, 24]", "[100, 24]"]),
    "turned": (BERT, "", replace(LAST_DENSE, lambda array: array.T), [LAST_DENSE, "[24, 40]", "[40, 24]"]),
    "whole_numbers": (BERT, "", replace(WORDS, lambda array: array.astype("<i8")), [WORDS, "I64"]),
    "wider": (BERT, "", with_config(intermediate_size=48), ["intermediate.dense", "[48, 24]", "[40, 24]"]),
    "more_layers": (BERT, "", with_config(num_hidden_layers=3), ["encoder.layer.2", "missing"]),
    "more_heads": (BERT, "", with_config(num_attention_heads=5), ["num_attention_heads", "5"]),
    "two_classes": (
        CLASSES,
        "",
        with_config(id2label={"0": "bad", "1": "good"}),
        ["classifier.weight", "[2, 24]", "[3, 24]"],
    ),
    "unnumbered_classes": (
        CLASSES,
        "",
        with_config(id2label={"1": "bad", "2": "so-so", "3": "good"}),
        ["config.json", "id2label"],
    ),
    "another_family": (BERT, "", with_config(model_type="gpt2", architectures=["GPT2Model"]), ["gpt2", *SUPPORTED]),
    "another_head": (
        BERT,
        "",
        with_config(architectures=["BertForTokenClassification"]),
        ["BertForTokenClassification", "ForSequenceClassification", *SUPPORTED],
    ),
    "no_family": (BERT, "", with_config(model_type=None), ["model_type", *SUPPORTED]),
    "relative": (BERT, "", with_config(position_embedding_type="relative_key"), ["position_embedding_type"]),
    "another_activation": (BERT, "", with_config(hidden_act="snake"), ["hidden_act", "snake", "gelu"]),
    "another_module": (BERT, "", modules(("1_Pooling", "Pooling"), ("2_Dense", "Dense")), ["modules.json", "Dense"]),
    "no_pooling": (BERT, "", without("1_Pooling/config.json"), ["1_Pooling", "missing"]),
    "pooling_elsewhere": (BERT, "", modules(("../1_Pooling", "Pooling")), ["modules.json", "../1_Pooling"]),
    "largest": (BERT, "", pooling(pooling_mode_max_tokens=True), ["1_Pooling", "max"]),
    "joined": (
        BERT,
        "",
        pooling(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True),
        ["1_Pooling", "cls", "mean"],
    ),
    "pickled": (BERT, "", pickled, ["model.safetensors"]),
    "shard_elsewhere": (BERT, "", shards({WORDS: "../bert-mean/1/model.safetensors"}), ["../bert-mean", "folder"]),
    "shard_missing": (BERT, "", shards({WORDS: "model-1.safetensors"}), ["model-1.safetensors"]),
    "shard_pickled": (BERT, "", shards({WORDS: "pytorch_model.bin"}), ["pytorch_model.bin", "safetensors"]),
    "longer": (BERT, "[text]\nmax_length = 100", None, ["text.max_length", "100", str(LIMIT)]),
    "of_nothing": (BERT, "[text]\nmax_length = 0", None, ["text.max_length"]),
    "of_ends_alone": (BERT, "[text]\nmax_length = 2", None, ["text.max_length", "2"]),
    "unknown_setting": (BERT, "[text]\ncut = true", None, ["cut"]),
    "unknown_pooling": (BERT, '[text]\npooling = "max"', None, ["max", "mean"]),
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    home = tmp_path_factory.mktemp("failing")
    repository = Repository(home / "models")
    for name, (checkpoint, settings, change, _) in FAILING.items():
        add(repository, name, checkpoint, settings, change)
    add(repository, BERT)
    with Server(repository.path, home) as running:
        yield running
        assert running.stop() == 0, running.tail()


@pytest.fixture(scope="module")
def index(failing):
    return {each["name"]: each for each in call(failing.rest, "POST", "/v2/repository/index").json()}


@pytest.mark.parametrize("name", FAILING)
def test_bad_files(index, name):
    entry = index[name]
    assert entry["state"] == "UNAVAILABLE"
    for word in FAILING[name][3]:
        assert word in entry["reason"], entry["reason"]


def test_the_model_beside_them_answers(failing, index):
    assert index[BERT]["state"] == "READY"
    wanted = expected(BERT)
    with GRPC.connect(failing) as client:
        check_answers(client.infer(BERT, {"text": texts_of(wanted["cases"])}), wanted, wanted["cases"])

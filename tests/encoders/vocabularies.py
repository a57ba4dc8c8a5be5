"""Small tokenizers, one of each kind that encoder models have, made of sentences written for the purpose."""

from collections import Counter

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece

SIZE = 180

SENTENCES = """
the tide comes in at noon and the gate opens for the boats
a small boat waits near the old stone gate until the water rises
children count the waves while their mother reads the paper
the keeper of the light writes down the wind every hour
we ship bread and salt and rope to the islands in the north
no one knows who painted the red door of the harbour office
heavy rain makes the river brown and the fields soft
her letter came late but it was good news for all of us
the engine would not start so they rowed home in the dark
there is a map of the coast in the second drawer on the left
every morning the baker opens the window and greets the sea
they sold the horse and bought a better one in the spring
is the water warm enough to swim in or should we wait
the price of fish fell again and nobody was happy about it
snow covered the road and the bus did not come until ten
he plays the violin badly and the neighbours like him anyway
write your name here and the number of the room below
the red kite rose above the roof and stayed there all day
some models answer quickly and others answer well
measure twice and cut once said the carpenter to the boy
""".strip().splitlines()

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
MARKS = ".,!?-'()"


def words():
    """The words of the sentences, the most frequent first."""
    counts = Counter(word for sentence in SENTENCES for word in sentence.split())
    return sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))


def word_pieces():
    """As BERT has it: lower case, words from the left, what is left of a word after `##`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    endings = ["##ed", "##er", "##ing", "##ly"]
    pieces = [*special, *LETTERS, *DIGITS, *MARKS, *(f"##{letter}" for letter in LETTERS), *endings, *words()]
    vocabulary = {piece: id for id, piece in enumerate(pieces[:SIZE])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    return marked(tokenizer, special)


def byte_pairs(special, unknown):
    """Merged bytes of the text, spaces included. Bytes that no sentence has are unknown, which keeps it small."""
    tokenizer = Tokenizer(BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=special,
        initial_alphabet=[*DIGITS, *MARKS, *LETTERS.upper()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return marked(tokenizer, special)


def byte_pairs_of_roberta():
    tokenizer = byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<unk>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def byte_pairs_of_modernbert():
    tokenizer = byte_pairs(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], "[UNK]")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def unigrams():
    """As XLM-RoBERTa has it: the most probable pieces, with a mark for the start of a word."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁", *LETTERS, *DIGITS, *MARKS, "é", "ü", "ß", *"абвгдежзиклмнопрст", *(f"▁{word}" for word in words())]
    scored = [(piece, 0.0) for piece in special]
    # Long pieces win over their letters, as a trained model has it.
    scored += [(piece, -round(8 + rank / 50, 4)) for rank, piece in enumerate(pieces[: SIZE - len(special)])]
    tokenizer = Tokenizer(Unigram(scored, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return marked(tokenizer, special)


def marked(tokenizer, special):
    tokenizer.add_special_tokens(special)
    return tokenizer

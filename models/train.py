"""Train the sample models and write each beside this script.

    pip install -r models/requirements.txt
    python models/train.py

For every model this writes `<name>/1/model.onnx`, `<name>/1/golden.json`, held-out
rows with what the model it was made from says of them, and `<name>/request.json`,
an inference request made of such rows. Each file is run with onnxruntime and
compared with the model it was made from. Everything is seeded and fitted weights
are rounded, so a second run writes the same bytes.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

SEED = 7
GOLDEN_ROWS = 40
HERE = Path(__file__).resolve().parent


def main():
    train_iris()
    train_digits()
    train_language()


# --- iris: a random forest over four measurements ---------------------------------


def train_iris():
    features, species = load_iris(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        features.astype(np.float32), species, stratify=species, random_state=SEED
    )
    forest = RandomForestClassifier(n_estimators=100, random_state=SEED)
    forest.fit(train_x, train_y)

    model = convert_sklearn(
        forest,
        name="iris",
        initial_types=[("X", FloatTensorType([None, 4]))],
        options={"zipmap": False},
        target_opset={"": 17, "ai.onnx.ml": 3},
    )
    rename_outputs(model.graph, ["label", "probabilities"])
    declare(model.graph.input, [("X", TensorProto.FLOAT, ["batch", 4])])
    declare(
        model.graph.output,
        [
            ("label", TensorProto.INT64, ["batch"]),
            ("probabilities", TensorProto.FLOAT, ["batch", 3]),
        ],
    )
    model.ir_version = 8
    # The converter imports the default operators twice.
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 17))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))

    one_of_each = [int(np.flatnonzero(test_y == k)[0]) for k in range(3)]
    rows = test_x[one_of_each]
    write("iris", model, v2_input("X", "FP32", rows.shape, shortest_floats(rows)))
    verify(
        "iris",
        {"X": test_x},
        {
            "label": forest.predict(test_x),
            "probabilities": forest.predict_proba(test_x),
        },
    )
    report("iris", forest.score(test_x, test_y), len(test_y))


def rename_outputs(graph, names):
    renamed = dict(zip([output.name for output in graph.output], names, strict=True))
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def declare(values, signature):
    del values[:]
    values.extend(helper.make_tensor_value_info(*value) for value in signature)


# --- digits: a small convolution net over 8x8 images ------------------------------

FILTERS = 16
BRIGHTEST = 16.0


def train_digits():
    data = load_digits()
    images = data.images[:, np.newaxis]
    train_x, test_x, train_y, test_y = train_test_split(
        images, data.target, test_size=0.25, stratify=data.target, random_state=SEED
    )
    weights = round_weights(fit_digits(train_x, train_y))

    write(
        "digits",
        digits_graph(weights),
        v2_input(
            "image", "FP32", (1, 1, 8, 8), test_x[:1].astype(int).ravel().tolist()
        ),
    )
    logits = digits_forward(weights, test_x)["logits"]
    verify("digits", {"image": test_x.astype(np.float32)}, {"logits": logits})
    accuracy = np.mean(logits.argmax(axis=1) == test_y)
    assert accuracy >= 0.95, accuracy
    report("digits", accuracy, len(test_y))


def fit_digits(images, labels, epochs=30, batch=32, rate=3e-3):
    """Adam on the cross-entropy; the rate falls to zero along a half cosine."""
    rng = np.random.default_rng(SEED)
    flat = FILTERS * 4 * 4
    weights = {
        "conv": rng.normal(0, np.sqrt(2 / 9), (9, FILTERS)),
        "conv_bias": np.zeros(FILTERS),
        "dense": rng.normal(0, np.sqrt(1 / flat), (flat, 10)),
        "dense_bias": np.zeros(10),
    }
    mean = {name: np.zeros_like(value) for name, value in weights.items()}
    square = {name: np.zeros_like(value) for name, value in weights.items()}
    per_epoch = len(images) // batch
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = rng.permutation(len(images))
        rows = order[step % per_epoch * batch :][:batch]
        gradients = digits_gradients(weights, images[rows], labels[rows])
        step_rate = rate * (1 + np.cos(np.pi * step / (epochs * per_epoch))) / 2
        for name, gradient in gradients.items():
            mean[name] += 0.1 * (gradient - mean[name])
            square[name] += 0.001 * (gradient**2 - square[name])
            m = mean[name] / (1 - 0.9 ** (step + 1))
            v = square[name] / (1 - 0.999 ** (step + 1))
            weights[name] -= step_rate * m / (np.sqrt(v) + 1e-8)
    return weights


def digits_forward(weights, images):
    """Every intermediate, because the gradients need them."""
    count = len(images)
    padded = np.pad(images[:, 0] / BRIGHTEST, ((0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    patches = patches.reshape(count, 8, 8, 9)
    active = np.maximum(patches @ weights["conv"] + weights["conv_bias"], 0)
    pooled = active.reshape(count, 4, 2, 4, 2, FILTERS).max(axis=(2, 4))
    # Channels first, as ONNX flattens them.
    flat = pooled.transpose(0, 3, 1, 2).reshape(count, -1)
    logits = flat @ weights["dense"] + weights["dense_bias"]
    return {
        "patches": patches,
        "active": active,
        "pooled": pooled,
        "flat": flat,
        "logits": logits,
    }


def digits_gradients(weights, images, labels):
    forward = digits_forward(weights, images)
    count = len(images)
    d_logits = softmax(forward["logits"])
    d_logits[np.arange(count), labels] -= 1
    d_logits /= count
    d_pooled = (d_logits @ weights["dense"].T).reshape(count, FILTERS, 4, 4)
    d_pooled = d_pooled.transpose(0, 2, 3, 1)[:, :, np.newaxis, :, np.newaxis]
    active = forward["active"].reshape(count, 4, 2, 4, 2, FILTERS)
    highest = forward["pooled"][:, :, np.newaxis, :, np.newaxis]
    d_active = np.where((active == highest) & (active > 0), d_pooled, 0)
    d_active = d_active.reshape(-1, FILTERS)
    return {
        "conv": forward["patches"].reshape(-1, 9).T @ d_active,
        "conv_bias": d_active.sum(axis=0),
        "dense": forward["flat"].T @ d_logits,
        "dense_bias": d_logits.sum(axis=0),
    }


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def digits_graph(weights):
    return make_model(
        "digits",
        nodes=[
            helper.make_node("Div", ["image", "brightest"], ["scaled"]),
            helper.make_node(
                "Conv",
                ["scaled", "conv", "conv_bias"],
                ["edges"],
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
            ),
            helper.make_node("Relu", ["edges"], ["active"]),
            helper.make_node(
                "MaxPool", ["active"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]
            ),
            helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "dense", "dense_bias"], ["logits"]),
        ],
        inputs=[("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        outputs=[("logits", TensorProto.FLOAT, ["batch", 10])],
        constants={
            "brightest": np.float32(BRIGHTEST),
            "conv": weights["conv"].T.reshape(FILTERS, 1, 3, 3).astype(np.float32),
            "conv_bias": weights["conv_bias"].astype(np.float32),
            "dense": weights["dense"].astype(np.float32),
            "dense_bias": weights["dense_bias"].astype(np.float32),
        },
        opsets={"": 17},
        ir_version=8,
    )


# --- language: which of five languages a short text is in -------------------------

LONGEST_GRAM = 3
BREAK = " "  # what every character that is no letter becomes
HELD_OUT = 5  # one sentence in so many


def train_language():
    train_x, train_y, test_x, test_y = [], [], [], []
    for language, sentences in SENTENCES.items():
        for position, sentence in enumerate(sentences.strip().splitlines()):
            held_out = position % HELD_OUT == 0
            (test_x if held_out else train_x).append(sentence)
            (test_y if held_out else train_y).append(language)

    folding = fold_table(train_x)
    grams = TfidfVectorizer(
        analyzer=lambda text: character_grams(text, folding), min_df=2
    )
    features = grams.fit_transform(train_x)
    classifier = LogisticRegression(C=100.0, tol=1e-9, max_iter=5000)
    classifier.fit(features, train_y)
    fitted = round_weights(
        {"idf": grams.idf_, "coef": classifier.coef_, "bias": classifier.intercept_}
    )
    grams.idf_, classifier.coef_, classifier.intercept_ = fitted.values()

    first_of_three = [test_y.index(language) for language in ("en", "fr", "de")]
    texts = [test_x[row] for row in first_of_three]
    write(
        "language",
        language_graph(folding, grams, classifier),
        v2_input("text", "BYTES", (3,), texts),
    )
    hard_x = ["", " ", "a", "ÉCOLE", "été 🌊 mañana", "Ωμέγα", "水", "tab\tnew\nline"]
    hard_x.append(" ".join(test_x))
    checked = test_x + hard_x
    probabilities = classifier.predict_proba(grams.transform(checked))
    labels = classifier.classes_[probabilities.argmax(axis=1)]
    verify(
        "language",
        {"text": np.array(checked, dtype=object)},
        {"language": labels.astype(object), "probabilities": probabilities},
    )
    report("language", np.mean(labels[: len(test_y)] == test_y), len(test_y))


def fold_table(texts):
    """Character to folded character: letters in lower case, the rest a break.

    A table and not StringNormalizer, which needs a locale that small images lack.
    Characters that are not in the table match no gram.
    """
    ascii_breaks = (chr(code) for code in range(1, 128) if not chr(code).isalpha())
    table = dict.fromkeys(ascii_breaks, BREAK)
    for character in sorted({c for text in texts for c in text.lower()}):
        table[character] = character if character.isalpha() else BREAK
        if len(character.upper()) == 1:
            table[character.upper()] = table[character]
    return table


def character_grams(text, folding):
    folded = [folding.get(character) for character in f" {text} "]
    for length in range(1, LONGEST_GRAM + 1):
        for start in range(len(folded) - length + 1):
            characters = folded[start : start + length]
            gram = "".join(characters) if None not in characters else BREAK
            if gram != BREAK and BREAK * 2 not in gram:
                yield gram


def language_graph(folding, grams, classifier):
    # The vectorizer's pool wants the grams of one length next to each other.
    vocabulary = sorted(grams.vocabulary_, key=lambda gram: (len(gram), gram))
    columns = [grams.vocabulary_[gram] for gram in vocabulary]
    lengths = [
        sum(len(gram) == n for gram in vocabulary) * n
        for n in range(1, LONGEST_GRAM + 1)
    ]
    letters = {
        letter: number for number, letter in enumerate(sorted(set(folding.values())))
    }
    return make_model(
        "language",
        nodes=[
            # The breaks at both ends also give the empty text characters.
            helper.make_node("StringConcat", ["break", "text"], ["opened"]),
            helper.make_node("StringConcat", ["opened", "break"], ["enclosed"]),
            helper.make_node(
                "Tokenizer",
                ["enclosed"],
                ["characters"],
                domain="com.microsoft",
                mark=0,
                mincharnum=1,
                pad_value="",
                separators=[""],
            ),
            helper.make_node(
                "LabelEncoder",
                ["characters"],
                ["letters"],
                domain="ai.onnx.ml",
                keys_strings=list(folding),
                default_int64=-1,
                values_int64s=[letters[letter] for letter in folding.values()],
            ),
            helper.make_node(
                "TfIdfVectorizer",
                ["letters"],
                ["weighted"],
                mode="TFIDF",
                min_gram_length=1,
                max_gram_length=LONGEST_GRAM,
                max_skip_count=0,
                ngram_counts=[sum(lengths[:n]) for n in range(LONGEST_GRAM)],
                ngram_indexes=list(range(len(vocabulary))),
                pool_int64s=[letters[letter] for gram in vocabulary for letter in gram],
                weights=grams.idf_[columns].tolist(),
            ),
            helper.make_node(
                "ReduceL2", ["weighted", "last_axis"], ["norm"], keepdims=1
            ),
            helper.make_node("Max", ["norm", "smallest"], ["divisor"]),
            helper.make_node("Div", ["weighted", "divisor"], ["normed"]),
            helper.make_node("Gemm", ["normed", "coef", "bias"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
            helper.make_node(
                "ArgMax", ["probabilities"], ["best"], axis=-1, keepdims=0
            ),
            helper.make_node("Gather", ["names", "best"], ["language"]),
        ],
        inputs=[("text", TensorProto.STRING, ["batch"])],
        outputs=[
            ("language", TensorProto.STRING, ["batch"]),
            ("probabilities", TensorProto.FLOAT, ["batch", len(classifier.classes_)]),
        ],
        constants={
            "break": np.array(BREAK, dtype=object),
            "last_axis": np.array([-1], dtype=np.int64),
            "smallest": np.float32(1e-6),
            "coef": classifier.coef_.T[columns].astype(np.float32),
            "bias": classifier.intercept_.astype(np.float32),
            "names": classifier.classes_.astype(object),
        },
        opsets={"": 20, "ai.onnx.ml": 3, "com.microsoft": 1},
        ir_version=9,
    )


# --- shared by all three ----------------------------------------------------------


def round_weights(weights):
    """Four decimals: the last bits of a sum differ from one processor to the next."""
    return {name: value.round(4) for name, value in weights.items()}


def make_model(name, nodes, inputs, outputs, constants, opsets, ir_version):
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [
            numpy_helper.from_array(np.asarray(value), key)
            for key, value in constants.items()
        ],
    )
    return helper.make_model(
        graph,
        producer_name="tidegate",
        opset_imports=[helper.make_opsetid(*opset) for opset in opsets.items()],
        ir_version=ir_version,
    )


def v2_input(name, datatype, shape, data):
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": data}


def shortest_floats(rows):
    """The shortest decimals that read back as the same float32s."""
    return [float(str(value)) for value in rows.ravel()]


def write(name, model, request_input):
    onnx.checker.check_model(model)
    version = HERE / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    request = json.dumps({"inputs": [request_input]}, ensure_ascii=False)
    (HERE / name / "request.json").write_text(request + "\n", encoding="utf-8")


def write_golden(name, feeds, expected):
    """One case with all rows, and one with the first of them alone."""
    rows = len(next(iter(feeds.values())))

    def tensors(values, count):
        return [v2_tensor(key, value[:count]) for key, value in values.items()]

    cases = [
        {"inputs": tensors(feeds, count), "outputs": tensors(expected, count)}
        for count in (min(rows, GOLDEN_ROWS), 1)
    ]
    text = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    path = HERE / name / "1" / "golden.json"
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def v2_tensor(name, values):
    if values.dtype == object:
        return v2_input(name, "BYTES", values.shape, values.ravel().tolist())
    if values.dtype.kind == "i":
        return v2_input(name, "INT64", values.shape, values.ravel().tolist())
    return v2_input(
        name, "FP32", values.shape, shortest_floats(values.astype(np.float32))
    )


def verify(name, feeds, expected):
    """The file must agree with its source, and a row must not feel its neighbours."""
    write_golden(name, feeds, expected)
    path = HERE / name / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for value in session.get_inputs() + session.get_outputs():
        assert value.shape[0] == "batch", (name, value)

    together = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    for key, reply in together.items():
        assert_close(f"{name}.{key}", reply, expected[key])

    rows = len(next(iter(feeds.values())))
    for size in (1, 7):
        for start in range(0, rows, size):
            part = slice(start, start + size)
            few = session.run(
                list(expected), {key: feed[part] for key, feed in feeds.items()}
            )
            for key, reply in zip(expected, few, strict=True):
                what = f"{name}.{key}[{start}:][:{size}]"
                assert_close(what, reply, together[key][part])


def assert_close(what, reply, expected):
    assert reply.shape == expected.shape, (what, reply.shape, expected.shape)
    if reply.dtype == np.float32:
        np.testing.assert_allclose(reply, expected, rtol=1e-4, atol=1e-6, err_msg=what)
    else:
        np.testing.assert_array_equal(reply, expected, err_msg=what)


def report(name, accuracy, rows):
    size = (HERE / name / "1" / "model.onnx").stat().st_size
    print(f"{name}: {accuracy:.3f} of {rows} held-out rows right, {size} bytes")


# --- the texts of `language`, written for it --------------------------------------

SENTENCES = {
    "de": """
Der Zug nach Hamburg hat heute leider Verspätung.
Ich habe den Schlüssel wieder auf dem Küchentisch vergessen.
Kannst du mir bitte das Salz geben?
Am Wochenende wollen wir in den Bergen wandern.
Die Kinder spielen draußen im Garten.
Das Wasser steht bis an die Kante der Schleuse.
Morgen früh muss ich zum Arzt gehen.
Wo finde ich hier eine Bäckerei?
Meine Schwester arbeitet seit zwei Jahren in einem Krankenhaus.
Es regnet schon den ganzen Nachmittag.
Wir sollten vor dem Abend noch Brot kaufen.
Das neue Buch gefällt mir sehr gut.
Er hat gestern seine alte Jacke verkauft.
Warum ist das Fenster in der Küche offen?
Nach dem Essen trinken wir meistens einen Kaffee.
Der Nachbar hat einen großen schwarzen Hund.
Sie möchte nächstes Jahr Medizin studieren.
Bitte schließen Sie die Tür leise hinter sich.
Im Winter ist der See oft zugefroren.
Ich weiß nicht, ob der Laden sonntags geöffnet ist.
Die Rechnung kommt nächste Woche mit der Post.
Unser Boot liegt am Steg neben dem Leuchtturm.
Hast du schon gehört, was im Dorf passiert ist?
Zwischen den Häusern wächst ein alter Kirschbaum.
Sein Fahrrad braucht dringend neue Bremsen.
Heute Abend gibt es Suppe mit frischem Gemüse.
Niemand hat gesagt, dass es einfach wird.
Die Lehrerin erklärt die Aufgabe noch einmal.
Ohne Brille kann ich die Schrift nicht lesen.
Vielen Dank für deine schnelle Antwort.
Der Wind dreht und wir müssen zurück in den Hafen.
Wie spät ist es eigentlich?
Mein Großvater hat diese Uhr selbst repariert.
Auf dem Markt gibt es im Herbst viele Äpfel.
Sie sprechen zu schnell für mich.
Das Licht im Flur geht nicht mehr an.
Vor der Brücke biegen Sie links ab.
Wir haben uns lange nicht gesehen.
Die Katze schläft am liebsten auf der Heizung.
Zum Geburtstag wünsche ich mir ein Zelt.
""",
    "en": """
The boat left the harbour before anyone was awake.
I cannot find the key to the shed.
Would you like some more tea with that?
We are walking to the village after lunch.
Her brother works at the bakery on the corner.
It has been raining since early this morning.
Please close the gate when you leave.
They moved here from the coast three years ago.
What time does the last bus go?
My shoes are still wet from yesterday.
The teacher asked everyone to read the next page.
There is nothing left in the fridge but milk.
He should have told us about the broken window.
The water rises quickly when the wind turns.
Where did you put the blue folder?
Our neighbours grow tomatoes on their roof.
Nobody knew how the old clock worked.
She is thinking of learning to sail this summer.
You might want to bring a warm coat.
The train was so full that we had to stand.
Thank you for answering so quickly.
This soup needs a little more salt.
Could someone help me carry these boxes?
The children are building a house out of cardboard.
I have not heard from him in months.
Turn right after the bridge and follow the river.
Most of the shops are closed on Sunday.
We were talking about which film to watch.
The lighthouse can be seen from very far away.
His grandmother still writes letters by hand.
Do you think it will snow tonight?
The printer stopped working again this afternoon.
Those apples are cheaper at the market.
Everything you need is in the second drawer.
She laughed when she saw what the dog had done.
Let us meet at the station around eight.
They would rather stay home than go out.
The room upstairs gets the best light.
I will fix the chair before the guests arrive.
Without her glasses she could not read the sign.
""",
    "es": """
El barco sale del puerto antes del amanecer.
No encuentro las llaves del coche por ninguna parte.
¿Quieres un poco más de café con leche?
Mañana vamos a caminar hasta el pueblo.
Mi hermano trabaja en una panadería cerca de la plaza.
Lleva lloviendo toda la tarde sin parar.
Cierra la puerta cuando salgas, por favor.
Ellos vinieron de la costa hace tres años.
¿A qué hora pasa el último autobús?
Todavía tengo los zapatos mojados de ayer.
La maestra explicó la lección otra vez.
En la nevera solo queda un poco de queso.
Él debería habernos dicho lo de la ventana rota.
El agua sube muy rápido cuando cambia el viento.
¿Dónde has puesto la carpeta azul?
Nuestros vecinos cultivan tomates en la terraza.
Nadie sabía cómo funcionaba aquel reloj viejo.
Ella quiere aprender a navegar este verano.
Será mejor que lleves un abrigo.
El tren iba tan lleno que tuvimos que ir de pie.
Muchas gracias por responder tan pronto.
A esta sopa le falta sal.
¿Alguien puede ayudarme con estas cajas?
Los niños están jugando en el jardín.
Hace meses que no sé nada de él.
Después del puente gire a la derecha.
Los domingos casi todas las tiendas están cerradas.
Estábamos hablando de la película de anoche.
Desde muy lejos se ve la luz del faro.
Su abuela todavía escribe cartas a mano.
¿Crees que nevará esta noche?
La impresora ha dejado de funcionar otra vez.
Las manzanas son más baratas en el mercado.
Todo lo que necesitas está en el segundo cajón.
Se echó a reír al ver lo que había hecho el perro.
Nos vemos en la estación a las ocho.
Prefieren quedarse en casa que salir.
La habitación de arriba tiene mejor luz.
Voy a arreglar la silla antes de que lleguen los invitados.
Sin gafas no podía leer el cartel.
""",
    "fr": """
Le bateau quitte le port avant le lever du jour.
Je ne trouve plus les clés de la voiture.
Voulez-vous encore un peu de thé ?
Demain nous irons au village à pied.
Son frère travaille dans une boulangerie près de la gare.
Il pleut depuis ce matin et ça ne s'arrête pas.
Ferme la porte en partant, s'il te plaît.
Ils sont venus de la côte il y a trois ans.
À quelle heure passe le dernier bus ?
Mes chaussures sont encore mouillées.
La maîtresse a expliqué la leçon une deuxième fois.
Il ne reste que du fromage dans le frigo.
Il aurait dû nous parler de la fenêtre cassée.
L'eau monte très vite quand le vent tourne.
Où as-tu mis le dossier bleu ?
Nos voisins font pousser des tomates sur leur toit.
Personne ne savait comment marchait cette vieille horloge.
Elle voudrait apprendre à naviguer cet été.
Tu devrais prendre un manteau chaud.
Le train était si plein que nous sommes restés debout.
Merci beaucoup pour votre réponse rapide.
Cette soupe manque un peu de sel.
Quelqu'un peut m'aider à porter ces cartons ?
Les enfants jouent dehors dans le jardin.
Je n'ai pas de ses nouvelles depuis des mois.
Tournez à droite après le pont et suivez la rivière.
Presque tous les magasins sont fermés le dimanche.
Nous parlions du film d'hier soir.
On voit la lumière du phare de très loin.
Sa grand-mère écrit toujours ses lettres à la main.
Crois-tu qu'il va neiger cette nuit ?
L'imprimante est encore tombée en panne.
Les pommes sont moins chères au marché.
Tout ce qu'il vous faut est dans le deuxième tiroir.
Elle a ri en voyant ce que le chien avait fait.
On se retrouve à la gare vers huit heures.
Ils préfèrent rester chez eux plutôt que sortir.
La chambre du haut est la plus lumineuse.
Je vais réparer la chaise avant l'arrivée des invités.
Sans ses lunettes, elle ne pouvait pas lire le panneau.
""",
    "it": """
La barca lascia il porto prima dell'alba.
Non trovo più le chiavi della macchina.
Vuoi ancora un po' di caffè?
Domani andiamo a piedi fino al paese.
Mio fratello lavora in una panetteria vicino alla piazza.
Piove da questa mattina e non smette più.
Chiudi la porta quando esci, per favore.
Sono arrivati dalla costa tre anni fa.
A che ora passa l'ultimo autobus?
Ho ancora le scarpe bagnate da ieri.
La maestra ha spiegato la lezione un'altra volta.
Nel frigorifero è rimasto solo un pezzo di formaggio.
Avrebbe dovuto dirci della finestra rotta.
L'acqua sale molto in fretta quando gira il vento.
Dove hai messo la cartella blu?
I nostri vicini coltivano pomodori sul tetto.
Nessuno sapeva come funzionasse quel vecchio orologio.
Lei vorrebbe imparare ad andare in barca quest'estate.
È meglio che tu prenda un cappotto pesante.
Il treno era così pieno che siamo rimasti in piedi.
Grazie mille per aver risposto così presto.
A questa minestra manca un po' di sale.
Qualcuno mi aiuta a portare queste scatole?
I bambini stanno giocando in giardino.
Non ho sue notizie da mesi.
Dopo il ponte gira a destra e segui il fiume.
La domenica quasi tutti i negozi sono chiusi.
Stavamo parlando del film di ieri sera.
La luce del faro si vede da molto lontano.
Sua nonna scrive ancora le lettere a mano.
Secondo te nevicherà questa notte?
La stampante ha smesso di funzionare un'altra volta.
Le mele costano meno al mercato.
Tutto quello che ti serve è nel secondo cassetto.
Si è messa a ridere vedendo cosa aveva fatto il cane.
Ci vediamo alla stazione verso le otto.
Preferiscono restare a casa piuttosto che uscire.
La stanza di sopra ha la luce migliore.
Devo aggiustare la sedia prima che arrivino gli ospiti.
Senza occhiali non riusciva a leggere il cartello.
""",
}


if __name__ == "__main__":
    main()

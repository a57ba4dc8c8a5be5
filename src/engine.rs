//! The request path, top to bottom: find the version, check the inputs, let it run, choose the outputs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

pub mod shadow;

use shadow::Shadows;

use crate::{
    backend::Signature,
    error::{Code, Error},
    id::ModelName,
    metrics::{Protocol, Way},
    model::{
        ModelVersion, Refused,
        catalog::{Catalog, CatalogReader, Deployment},
        schedule::Urgency,
    },
    observe::copies::Shed,
    rollout::route::{Choice, Sticky, Variant},
    tensor::Tensor,
    text,
};

/// Answers inference requests from the versions in the catalog.
#[derive(Clone)]
pub struct Engine {
    catalog: CatalogReader,
    shadows: Shadows,
    /// Numbers the requests that have no key and no id to be drawn by.
    drawn: Arc<AtomicU64>,
}

/// What a request says, in front of its body, of who shall answer it.
#[derive(Clone, Copy)]
pub struct Wish<'a> {
    /// Empty or `None` for whatever the route has for it.
    pub version: Option<&'a str>,
    /// The variant it asks for by name, which its caller may do.
    pub variant: Option<&'a str>,
    /// Its own id, or empty.
    pub request_id: &'a str,
    /// Its headers, by name.
    pub header: &'a dyn Fn(&str) -> Option<&'a [u8]>,
}

/// The version that a request will run on, and how it came to it.
pub struct Target {
    pub version: Arc<ModelVersion>,
    pub variant: Variant,
    pub way: Way,
    /// What the route is called that it was drawn by, or asked past.
    pub rollout: Option<Arc<str>>,
    /// Whether whoever sends the same key gets the same version; `None` when there was nothing to draw.
    pub sticky: Option<bool>,
    /// Who gets a copy.
    pub shadow: Option<Arc<ModelVersion>>,
    /// Who would have answered, where another version was drawn.
    stable: Option<Arc<ModelVersion>>,
    /// Where to draw from once the body is read.
    undrawn: Option<Undrawn>,
}

struct Undrawn {
    catalog: Arc<Catalog>,
    model: ModelName,
}

/// One request, decoded.
pub struct Request<'a> {
    pub inputs: Vec<Tensor>,
    /// Names of the outputs to return, in that order; empty for all.
    pub outputs: &'a [Arc<str>],
    pub urgency: Urgency,
    /// What it wants of its texts.
    pub text: &'a text::Wish,
    /// When it arrived, and by which way.
    pub started: Instant,
    pub protocol: Protocol,
}

impl Engine {
    pub fn new(catalog: CatalogReader, shadows: Shadows) -> Self {
        Self { catalog, shadows, drawn: Arc::default() }
    }

    pub fn catalog(&self) -> &CatalogReader {
        &self.catalog
    }

    /// The version that a question about a model is about; `version` empty or `None` means the stable one.
    ///
    /// # Errors
    /// `NotFound` and `NotReady` naming the model.
    pub fn find(&self, model: &str, version: Option<&str>) -> Result<Arc<ModelVersion>, Error> {
        self.catalog.load().find(model, named(version)).cloned()
    }

    /// Chooses the version for a request. What the choice needs of the body is told to `Target::draw`.
    ///
    /// # Errors
    /// `NotFound` and `NotReady` naming the model.
    pub fn resolve(&self, model: &str, wish: &Wish<'_>) -> Result<Target, Error> {
        let catalog = self.catalog.load();
        let pinned = named(wish.version);
        let deployment = catalog.deployment(model)?;
        let version = deployment.find(model, pinned)?.clone();
        let route = deployment.route.as_ref();
        let mut target = Target {
            version,
            variant: Variant::Stable,
            way: Way::Stable,
            rollout: route.map(|route| route.id.clone()),
            sticky: None,
            shadow: None,
            stable: None,
            undrawn: None,
        };
        if pinned.is_some() {
            target.way = Way::Pinned;
            target.variant = route.map_or(Variant::Stable, |route| route.variant_of(&target.version.version).clone());
        } else if let Some(variant) = wish.variant {
            target.force(deployment, variant)?;
        } else if let Some(route) = route.filter(|route| !route.is_plain()) {
            match &route.sticky {
                Some(Sticky::Header(name)) if let Some(key) = (wish.header)(name).filter(|key| !key.is_empty()) => {
                    target.take(deployment, route.choose(key), true);
                }
                None | Some(Sticky::Header(_)) if !wish.request_id.is_empty() => {
                    target.take(deployment, route.choose(wish.request_id.as_bytes()), false);
                }
                _ => {
                    let model = target.version.name.clone();
                    target.undrawn = Some(Undrawn { catalog: catalog.clone(), model });
                }
            }
        }
        Ok(target)
    }

    /// Draws the version for a request whose body is read, unless its headers were enough. `key` finds what is sticky;
    /// `request_id` is the body's.
    pub fn draw<K: AsRef<[u8]>>(&self, target: &mut Target, request_id: &str, key: impl FnOnce(&Sticky) -> Option<K>) {
        let Some(Undrawn { catalog, model }) = target.undrawn.take() else { return };
        let Some(deployment) = catalog.deployments.get(&model) else { return };
        let Some(route) = &deployment.route else { return };
        match route.sticky.as_ref().and_then(key) {
            Some(key) => target.take(deployment, route.choose(key.as_ref()), true),
            None if !request_id.is_empty() => target.take(deployment, route.choose(request_id.as_bytes()), false),
            None => {
                let number = self.drawn.fetch_add(1, Ordering::Relaxed);
                target.take(deployment, route.choose(&number.to_le_bytes()), false);
            }
        }
    }

    /// Runs the request on `target`, or on its successor when the target stopped taking requests meanwhile.
    ///
    /// # Errors
    /// `InvalidArgument` for inputs or outputs that do not fit the model, else what the queue or the run says.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps what it is given twice")]
    pub fn infer(
        &self,
        target: &mut Target,
        mut request: Request<'_>,
    ) -> impl Future<Output = Result<Vec<Tensor>, Error>> {
        async move {
            let mut underway = Underway { target, started: request.started, over: false };
            let answer = self.run(underway.target, &mut request).await;
            underway.over = true;
            let Underway { target, started, .. } = &underway;
            let tally = &target.version.tally;
            match answer {
                Ok((outputs, chosen)) => {
                    tally.answered(target.way, started.elapsed(), &outputs);
                    // What is counted and compared is as the model gives it, whatever clients want of it.
                    let outputs = match &target.version.text {
                        Some(front) => front.scored(outputs, request.text),
                        None => outputs,
                    };
                    Ok(select(outputs, &chosen))
                }
                Err(Failed { error, blames_client }) => {
                    if !blames_client {
                        tally.failed(target.way);
                    }
                    Err(error)
                }
            }
        }
    }

    /// All outputs of the version that ran, and the positions of those that are wanted.
    async fn run(&self, target: &mut Target, request: &mut Request<'_>) -> Result<(Vec<Tensor>, Vec<usize>), Failed> {
        if request.urgency.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            let error = Error::new(Code::DeadlineExceeded, "the deadline had passed when the request arrived");
            return Err(Failed { error, blames_client: true });
        }
        let mut inputs = std::mem::take(&mut request.inputs);
        // One more look at the catalog makes version changes lossless: a version stops taking requests only after
        // its successor was published.
        for _ in 0..2 {
            let version = &target.version;
            // What another version would have taken is no fault of its client.
            let spare = target.stable.as_ref().map(|stable| (stable, inputs.clone()));
            let (chosen, arranged) = fit(version, request, inputs).map_err(|error| {
                let fits_stable = spare.is_some_and(|(stable, inputs)| fit(stable, request, inputs).is_ok());
                Failed { error, blames_client: !fits_stable }
            })?;
            // A version has nothing to compare with itself.
            let candidate = target.shadow.as_ref().filter(|candidate| !Arc::ptr_eq(candidate, version));
            let original =
                candidate.map(|candidate| self.shadows.keep(candidate, &arranged, request.text, request.protocol));
            match version.infer(arranged, &request.urgency, request.text).await {
                Ok(outputs) => {
                    if let Some(original) = original {
                        let promised = outputs.get(..version.signature.outputs.len());
                        self.shadows.offer(original, promised.unwrap_or(&outputs));
                    }
                    return Ok((outputs, chosen));
                }
                Err(Refused::Error(error)) => return Err(error.into()),
                Err(Refused::Draining(back)) => inputs = back,
            }
            target.succeed(&self.catalog.load())?;
        }
        Err(unloaded(&target.version).into())
    }
}

/// A request that came to nothing.
struct Failed {
    error: Error,
    /// Whether its version would have answered a better one.
    blames_client: bool,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, blames_client: false }
    }
}

/// The positions of the outputs that are wanted, and the inputs in the order of the signature.
fn fit(version: &ModelVersion, request: &Request<'_>, inputs: Vec<Tensor>) -> Result<(Vec<usize>, Vec<Tensor>), Error> {
    let chosen = choose(version, request.outputs)?;
    version.check_wish(request.text)?;
    Ok((chosen, version.signature.arrange(version.name.as_str(), inputs)?))
}

/// What a request is told whose version took no more of it, and had no successor.
fn unloaded(version: &ModelVersion) -> Error {
    let (name, version) = (&version.name, &version.version);
    Error::new(Code::NotReady, format!("model '{name}' version '{version}' was unloaded before the request could run"))
}

/// A version that a request names.
fn named(version: Option<&str>) -> Option<&str> {
    version.filter(|version| !version.is_empty())
}

impl Target {
    /// Whether the version is drawn by what the body says.
    pub fn is_undrawn(&self) -> bool {
        self.undrawn.is_some()
    }

    /// Makes no copy for a candidate that would read the request otherwise than `signature`, which makes it `read`, and
    /// counts that.
    ///
    /// It is for requests that have no types of their own: those that they have, they have from `signature`.
    pub fn shadow_if_read_like(&mut self, signature: &Signature, read: &[Tensor]) {
        if let Some(candidate) = self.shadow.take_if(|candidate| !candidate.signature.is_read_like(signature, read)) {
            candidate.tally.shed(Shed::Untyped);
        }
    }

    /// To the variant that was asked for by name.
    fn force(&mut self, deployment: &Deployment, variant: &str) -> Result<(), Error> {
        let name = &self.version.name;
        let unknown = |known: &[&str]| {
            let variant = crate::id::shorten(variant);
            Error::not_found(format!("model '{name}' has no variant '{variant}'; it has {}", known.join(", ")))
        };
        let stable = Variant::Stable;
        let choice = match &deployment.route {
            None if variant == stable.as_str() => None,
            None => return Err(unknown(&[stable.as_str()])),
            Some(route) => {
                let variants =
                    std::iter::once(stable.as_str()).chain(route.arms.iter().map(|arm| arm.variant.as_str()));
                Some(route.forced(variant).ok_or_else(|| unknown(&variants.collect::<Vec<_>>()))?)
            }
        };
        if let Some(choice) = choice {
            self.take(deployment, choice, true);
        }
        (self.way, self.sticky) = (Way::Pinned, None);
        Ok(())
    }

    /// To what was drawn.
    fn take(&mut self, deployment: &Deployment, choice: Choice<'_>, sticky: bool) {
        let serving = |version: &crate::id::Version| deployment.entry(version.as_str())?.serving.clone();
        // A catalog is published only with routes whose versions serve; without it the stable version stays.
        if let Some(version) = serving(choice.version) {
            let before = std::mem::replace(&mut self.version, version);
            (self.variant, self.way) = (choice.variant.clone(), choice.variant.way());
            self.stable = (self.way != Way::Stable).then_some(before);
        }
        self.shadow = choice.shadow.and_then(serving);
        self.sticky = Some(sticky);
    }

    /// To whatever stands in for a version that takes no more requests: if it was asked for by name, the same name.
    fn succeed(&mut self, catalog: &Catalog) -> Result<(), Error> {
        let version = &self.version;
        // When the request came, the model was there.
        let known = |error: Error| if error.code == Code::NotFound { unloaded(version) } else { error };
        let deployment = catalog.deployment(version.name.as_str()).map_err(known)?;
        let arms = deployment.route.iter().flat_map(|route| &route.arms);
        // Loaded anew, it still has its share.
        let same = self.way == Way::Pinned || arms.into_iter().any(|arm| arm.version == version.version);
        let named = same.then_some(version.version.as_str());
        let successor = deployment.find(version.name.as_str(), named).map_err(known)?.clone();
        if !same {
            (self.variant, self.way) = (Variant::Stable, Way::Stable);
            (self.shadow, self.stable) = (None, None);
        }
        self.version = successor;
        Ok(())
    }
}

/// A request on its way; dropped before it is over, it was given up.
struct Underway<'a> {
    target: &'a mut Target,
    started: Instant,
    over: bool,
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.target.version.tally.given_up(self.target.way, self.started.elapsed());
        }
    }
}

/// Positions of the requested outputs in the signature; empty for all.
fn choose(version: &ModelVersion, names: &[Arc<str>]) -> Result<Vec<usize>, Error> {
    let outputs = &version.signature.outputs;
    names
        .iter()
        .map(|name| {
            outputs.iter().position(|spec| spec.name == *name).ok_or_else(|| {
                let known: Vec<String> = outputs.iter().map(|spec| format!("'{}'", spec.name)).collect();
                Error::invalid(format!(
                    "model '{}' has no output '{}'; its outputs are {}",
                    version.name,
                    crate::id::shorten(name),
                    known.join(", ")
                ))
            })
        })
        .collect()
}

fn select(outputs: Vec<Tensor>, chosen: &[usize]) -> Vec<Tensor> {
    if chosen.is_empty() { outputs } else { chosen.iter().map(|&index| outputs[index].clone()).collect() }
}

//! `Elsewhere`: looks at folders that models' settings name, each on a thread of its own, so that one on a disk that does not
//! answer keeps nobody waiting for long: neither other models, nor the server's end.

use std::{collections::BTreeMap, io, path::PathBuf, thread, time::Duration};

use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    time::{Instant, timeout_at},
};

use crate::id::ModelName;

/// Looks under way, by model, each for a `T`.
pub struct Elsewhere<T> {
    looks: BTreeMap<ModelName, Look<T>>,
}

impl<T> Default for Elsewhere<T> {
    fn default() -> Self {
        Self { looks: BTreeMap::new() }
    }
}

/// A folder to be looked at.
pub struct Wanted<T> {
    pub name: ModelName,
    pub folder: PathBuf,
    pub scan: Box<dyn FnOnce() -> io::Result<T> + Send>,
}

struct Look<T> {
    folder: PathBuf,
    began: Instant,
    found: oneshot::Receiver<io::Result<T>>,
}

impl<T: Send + 'static> Elsewhere<T> {
    /// Forgets the looks for models that are not meant any more.
    pub fn retain(&mut self, is_meant: impl Fn(&ModelName) -> bool) {
        self.looks.retain(|name, _| is_meant(name));
    }

    /// Forgets a look that has ended and began longer ago than `age`: what it has found is of then.
    pub fn forget_ended(&mut self, name: &ModelName, age: Duration) {
        // Asking takes out what it has found.
        let is_under_way = |look: &mut Look<T>| matches!(look.found.try_recv(), Err(TryRecvError::Empty));
        self.looks.retain(|other, look| other != name || look.began.elapsed() < age || is_under_way(look));
    }

    /// What the folders hold. A look that takes longer than `patience` is an error, and goes on: what it finds is told the
    /// next time, which does not wait for it again.
    pub async fn look(&mut self, wanted: Vec<Wanted<T>>, patience: Duration) -> BTreeMap<ModelName, io::Result<T>> {
        let mut found = BTreeMap::new();
        let mut new = Vec::new();
        for Wanted { name, folder, scan } in wanted {
            match self.looks.get_mut(&name).filter(|look| look.folder == folder).map(|look| look.found.try_recv()) {
                Some(Err(TryRecvError::Empty)) => drop(found.insert(name, Err(silent(&folder)))),
                Some(Ok(result)) => {
                    self.looks.remove(&name);
                    found.insert(name, result);
                }
                None | Some(Err(TryRecvError::Closed)) => match begin(scan) {
                    Ok(look) => new.push((name, folder, look)),
                    Err(error) => drop(found.insert(name, Err(error))),
                },
            }
        }
        let began = Instant::now();
        let deadline = began + patience;
        for (name, folder, mut look) in new {
            let result = match timeout_at(deadline, &mut look).await {
                Ok(result) => result.unwrap_or_else(|_| Err(io::Error::other("looking at it panicked"))),
                Err(_) => {
                    let error = silent(&folder);
                    self.looks.insert(name.clone(), Look { folder, began, found: look });
                    Err(error)
                }
            };
            found.insert(name, result);
        }
        found
    }
}

fn begin<T: Send + 'static>(
    scan: Box<dyn FnOnce() -> io::Result<T> + Send>,
) -> io::Result<oneshot::Receiver<io::Result<T>>> {
    let (tell, told) = oneshot::channel();
    // Nobody may listen any more.
    thread::Builder::new().name("look".to_owned()).spawn(move || drop(tell.send(scan())))?;
    Ok(told)
}

fn silent(folder: &std::path::Path) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("the disk of {} does not answer", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn wanted(name: &str, folder: &'static str, gate: Option<mpsc::Receiver<()>>) -> Wanted<&'static str> {
        let scan = Box::new(move || {
            gate.map(|gate| gate.recv());
            Ok(folder)
        });
        Wanted { name: ModelName::parse(name).unwrap(), folder: folder.into(), scan }
    }

    #[tokio::test]
    async fn a_disk_that_does_not_answer_is_waited_for_once() {
        let mut elsewhere = Elsewhere::default();
        let (open, gate) = mpsc::channel();
        let started = Instant::now();
        let both = vec![wanted("hung", "/hung", Some(gate)), wanted("quick", "/quick", None)];
        let found = elsewhere.look(both, Duration::from_secs(2)).await;
        assert_eq!(*found["quick"].as_ref().unwrap(), "/quick");
        assert_eq!(found["hung"].as_ref().unwrap_err().to_string(), "the disk of /hung does not answer");
        let found = elsewhere.look(vec![wanted("hung", "/hung", None)], LONG).await;
        assert!(found["hung"].is_err() && started.elapsed() < LONG, "it is still being looked at");
        // Another folder is another matter.
        let found = elsewhere.look(vec![wanted("hung", "/other", None)], LONG).await;
        assert_eq!(*found["hung"].as_ref().unwrap(), "/other");

        open.send(()).unwrap();
        let found = loop {
            let found = elsewhere.look(vec![wanted("hung", "/hung", None)], LONG).await.remove("hung").unwrap();
            if found.is_ok() {
                break found;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        assert_eq!(found.unwrap(), "/hung");

        // What nobody has asked for in time is of then.
        let (open, gate) = mpsc::channel();
        let found = elsewhere.look(vec![wanted("left", "/left", Some(gate))], Duration::from_millis(10)).await;
        assert!(found["left"].is_err());
        let name = ModelName::parse("left").unwrap();
        elsewhere.forget_ended(&name, Duration::ZERO);
        assert!(elsewhere.looks.contains_key(&name), "it is under way");
        open.send(()).unwrap();
        while elsewhere.looks.contains_key(&name) {
            elsewhere.forget_ended(&name, Duration::ZERO);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        elsewhere.retain(|_| false);
        assert!(elsewhere.looks.is_empty());
    }
}

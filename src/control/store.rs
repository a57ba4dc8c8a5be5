//! `Store`: what must outlive a restart, in one SQLite file: what is remembered of each model, and the audit log.
//!
//! A change is written here before it takes effect, so that whatever the server did, it knows after a kill.

use std::{path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags, Transaction, params};

use crate::{
    error::{Code, Error},
    id::ModelName,
    rollout::Moment,
};

use super::standing::Standing;

mod audit;

pub use audit::{Entry, Logged, Verified};

const FILE: &str = "state.sqlite";
/// How long a change waits for somebody else who has the file.
const PATIENCE: Duration = Duration::from_millis(250);
/// Changes of the tables, in order; the file says how many it has seen.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE model (name TEXT PRIMARY KEY, standing TEXT NOT NULL) STRICT;
    CREATE TABLE audit (
        number INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, model TEXT NOT NULL, author TEXT NOT NULL,
        action TEXT NOT NULL, reason TEXT NOT NULL, details TEXT NOT NULL, hash TEXT NOT NULL
    ) STRICT;
    CREATE TABLE head (
        only INTEGER PRIMARY KEY CHECK (only = 1), number INTEGER NOT NULL, hash TEXT NOT NULL
    ) STRICT;
"];

/// What is remembered of each model by name, or why that of one cannot be read.
pub type Standings = Vec<(ModelName, Result<Standing, Error>)>;

/// The open file.
pub struct Store {
    connection: Connection,
}

/// The store as tasks share it; nothing waits for the disk on a thread that serves.
#[derive(Clone)]
pub struct SharedStore(Result<Arc<Mutex<Store>>, Error>);

impl SharedStore {
    /// Opens the store in the data directory. Without one the server serves on, and every use says why there is none.
    pub fn open(directory: &Path) -> Self {
        let store = Store::open(directory);
        Self(store.map(|store| Arc::new(Mutex::new(store))).inspect_err(|error| {
            tracing::error!(%error, "changes of routes will be refused");
        }))
    }

    /// Works with the store on a thread that may wait.
    ///
    /// # Errors
    /// `NotReady` without a store, and what the work says.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = self.0.clone()?;
        let done = tokio::task::spawn_blocking(move || work(&mut store.lock())).await;
        done.unwrap_or_else(|_| Err(Error::internal("the server's state broke down")))
    }
}

impl Store {
    /// Opens the file in the data directory, or makes it.
    ///
    /// # Errors
    /// `NotReady` naming the file.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(FILE);
        let open = || -> rusqlite::Result<Connection> {
            let mut connection = Connection::open(&path)?;
            connection.busy_timeout(PATIENCE)?;
            connection.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
            // A change that was answered is on the disk.
            connection.pragma_update(None, "synchronous", "full")?;
            migrate(&mut connection)?;
            Ok(connection)
        };
        let connection = open().map_err(|error| unavailable(&format!("{}: {error}", path.display())))?;
        Ok(Self { connection })
    }

    /// Opens the file in the data directory to read it, also while a server writes to it.
    ///
    /// # Errors
    /// `NotReady` naming the file.
    pub fn open_to_read(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(FILE);
        let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY);
        let connection = connection.map_err(|error| unavailable(&format!("{}: {error}", path.display())))?;
        Ok(Self { connection })
    }

    /// What is remembered of each model. What cannot be read of one says so in its place; the others are none the worse.
    ///
    /// # Errors
    /// `NotReady` when the file cannot be read.
    pub fn standings(&self) -> Result<Standings, Error> {
        // Bytes, for a text that is none is that model's matter.
        let read = || -> rusqlite::Result<Vec<[Vec<u8>; 2]>> {
            let sql = "SELECT CAST(name AS BLOB), CAST(standing AS BLOB) FROM model ORDER BY name";
            self.connection.prepare(sql)?.query_map([], |row| Ok([row.get(0)?, row.get(1)?]))?.collect()
        };
        let rows = read().map_err(|error| unavailable(&error.to_string()))?;
        let parse = |[model, document]: [Vec<u8>; 2]| {
            let text = String::from_utf8_lossy(&model);
            let name = ModelName::parse(&text)
                .inspect_err(|error| tracing::error!(%error, "the state is of a model that cannot be, and is left out"))
                .ok()?;
            let standing = serde_json::from_slice(&document)
                .map_err(|error| unavailable(&format!("what is known of model '{name}': {error}")));
            Some((name, standing))
        };
        Ok(rows.into_iter().filter_map(parse).collect())
    }

    /// Stores what is to be remembered of a model and what is to be known of the change, both or neither.
    ///
    /// # Errors
    /// `NotReady` when it cannot be stored; then nothing is.
    pub fn save(&mut self, model: &ModelName, standing: &Standing, entry: &Entry) -> Result<(), Error> {
        let document = serde_json::to_string(standing).map_err(|error| Error::internal(error.to_string()))?;
        self.write(|transaction| {
            transaction.execute(
                "INSERT INTO model VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET standing = ?2",
                params![model.as_str(), document],
            )?;
            audit::add(transaction, entry)
        })
    }

    /// Adds to the audit log.
    ///
    /// # Errors
    /// `NotReady` when it cannot be stored.
    pub fn log(&mut self, entry: &Entry) -> Result<(), Error> {
        self.write(|transaction| audit::add(transaction, entry))
    }

    /// Entries of a model (of all without) since a moment and behind the one of a number, oldest first, at most so many.
    ///
    /// # Errors
    /// `NotReady` when the file cannot be read.
    pub fn audit(&self, model: Option<&str>, since: Moment, after: u64, most: usize) -> Result<Vec<Logged>, Error> {
        audit::read(&self.connection, model, since, after, most).map_err(|error| unavailable(&error.to_string()))
    }

    /// Follows the chain of hashes to its end, which must be where the last change left it. With a `head`, a hash that
    /// was noted down earlier, an entry must have it.
    ///
    /// # Errors
    /// `Conflict` naming the first entry that is not as it was written, is missing or too many, and `NotReady` when the
    /// file cannot be read.
    pub fn verify(&self, head: Option<&str>) -> Result<Verified, Error> {
        audit::verify(&self.connection, head).map_err(|error| unavailable(&error.to_string()))?
    }

    /// Writes a change with its entry. The log of the server gets the entry's hash: who keeps that log elsewhere knows
    /// later what the chain must hold.
    fn write(&mut self, work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<Verified>) -> Result<(), Error> {
        let write = || -> rusqlite::Result<Verified> {
            let transaction = self.connection.transaction()?;
            let end = work(&transaction)?;
            transaction.commit()?;
            Ok(end)
        };
        let Verified { entries, head } = write().map_err(|error| unavailable(&error.to_string()))?;
        tracing::info!(entry = entries, head, "the audit log has another entry");
        Ok(())
    }
}

fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let seen: usize = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for (index, migration) in MIGRATIONS.iter().enumerate().skip(seen) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "user_version", index + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

fn unavailable(reason: &str) -> Error {
    Error::new(Code::NotReady, format!("the server's state cannot be read or stored: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let [model, author, action, details] = ["m", "somebody", "advance", "{}"].map(str::to_owned);
        Entry { at: 1, model, author, action, reason: String::new(), details }
    }

    #[test]
    fn what_is_remembered_outlives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let model = ModelName::parse("m").unwrap();
        for expected in ["m/r1", "m/r2", "m/r3"] {
            let mut store = Store::open(folder.path()).unwrap();
            let known = store.standings().unwrap().pop();
            let mut standing = known.map_or_else(Standing::default, |(_, standing)| standing.unwrap());
            assert_eq!(&*standing.next_id(&model), expected);
            store.save(&model, &standing, &entry()).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_read_of_one_model_leaves_the_others_alone() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).unwrap();
        for name in ["a", "b", "c", "d"] {
            let standing = Standing { epoch: 7, ..Standing::default() };
            store.save(&ModelName::parse(name).unwrap(), &standing, &entry()).unwrap();
        }
        let broken = "UPDATE model SET standing = '{\"epoch\": \"seven\"}' WHERE name = 'b';
                      UPDATE model SET standing = CAST(x'ff' AS TEXT) WHERE name = 'c';
                      UPDATE model SET name = '../d' WHERE name = 'd';";
        store.connection.execute_batch(broken).unwrap();
        let [(a, good), (b, typed), (c, text)] = <[_; 3]>::try_from(store.standings().unwrap()).unwrap();
        assert_eq!((a.as_str(), good.unwrap().epoch), ("a", 7));
        for (name, standing) in [(b, typed), (c, text)] {
            let error = standing.unwrap_err();
            assert_eq!(error.code, Code::NotReady);
            assert!(error.message.contains(&format!("what is known of model '{name}': ")), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), "not a database, but long enough to be looked at as one").unwrap();
        let error = Store::open(folder.path()).map(|_| ()).unwrap_err();
        assert_eq!(error.code, Code::NotReady);
        assert!(error.message.contains(FILE), "{error}");
    }
}

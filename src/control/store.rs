//! `Store`: what must outlive a restart, in one SQLite file: what is remembered of each model, and the audit log.
//!
//! A change is written here before it takes effect, so that whatever the server did, it knows after a kill. Each audit
//! entry holds the hash of the one before: an entry that was changed or taken out later breaks the chain.

use std::{path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    error::{Code, Error},
    id::ModelName,
    rollout::Moment,
};

use super::standing::Standing;

const FILE: &str = "state.sqlite";
/// How long a change waits for somebody else who has the file.
const PATIENCE: Duration = Duration::from_millis(250);
/// Changes of the tables, in order; the file says how many it has seen.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE model (name TEXT PRIMARY KEY, standing TEXT NOT NULL) STRICT;
    CREATE TABLE audit (
        number INTEGER PRIMARY KEY, at INTEGER NOT NULL, model TEXT NOT NULL, author TEXT NOT NULL,
        action TEXT NOT NULL, reason TEXT NOT NULL, details TEXT NOT NULL, hash TEXT NOT NULL
    ) STRICT;
"];
/// What the first entry has for the hash of the one before.
const ORIGIN: &str = "";

/// What is written down of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    pub at: Moment,
    pub model: String,
    /// Who did it: an operator by name, `judge`, or `repository`.
    pub author: String,
    pub action: String,
    pub reason: String,
    /// The numbers behind it, as JSON.
    pub details: String,
}

/// An entry as the log has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Logged {
    pub number: u64,
    #[serde(flatten)]
    pub entry: Entry,
    pub hash: String,
}

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

    /// What is remembered of each model.
    ///
    /// # Errors
    /// `NotReady` when the file cannot be read or holds what this program does not know.
    pub fn standings(&self) -> Result<Vec<(ModelName, Standing)>, Error> {
        let read = || -> rusqlite::Result<Vec<(String, String)>> {
            let mut rows = self.connection.prepare("SELECT name, standing FROM model ORDER BY name")?;
            rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        let rows = read().map_err(|error| unavailable(&error.to_string()))?;
        let parse = |(model, document): (String, String)| {
            let standing = serde_json::from_str(&document)
                .map_err(|error| unavailable(&format!("what is known of model '{model}': {error}")))?;
            Ok((ModelName::parse(&model)?, standing))
        };
        rows.into_iter().map(parse).collect()
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
            log(transaction, entry)
        })
    }

    /// Adds to the audit log.
    ///
    /// # Errors
    /// `NotReady` when it cannot be stored.
    pub fn log(&mut self, entry: &Entry) -> Result<(), Error> {
        self.write(|transaction| log(transaction, entry))
    }

    /// Entries of a model (of all without) since a moment and behind the one of a number, oldest first, at most so many.
    ///
    /// # Errors
    /// `NotReady` when the file cannot be read.
    pub fn audit(&self, model: Option<&str>, since: Moment, after: u64, most: usize) -> Result<Vec<Logged>, Error> {
        let read = || -> rusqlite::Result<Vec<Logged>> {
            let sql = "SELECT number, at, model, author, action, reason, details, hash FROM audit
                       WHERE (?1 IS NULL OR model = ?1) AND at >= ?2 AND number > ?3 ORDER BY number LIMIT ?4";
            let mut rows = self.connection.prepare(sql)?;
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let [since, after] = [since, after].map(|number| i64::try_from(number).unwrap_or(i64::MAX));
            rows.query_map(params![model, since, after, most], logged)?.collect()
        };
        read().map_err(|error| unavailable(&error.to_string()))
    }

    /// Follows the chain of hashes; how many entries there are.
    ///
    /// # Errors
    /// `Conflict` naming the first entry that is not as it was written, or is missing.
    pub fn verify(&self) -> Result<u64, Error> {
        let mut before = ORIGIN.to_owned();
        let mut count = 0;
        for Logged { number, entry, hash } in self.audit(None, 0, 0, usize::MAX)? {
            count += 1;
            if number != count {
                return Err(Error::new(Code::Conflict, format!("audit entry {count} is missing")));
            }
            if chained(&before, &entry) != hash {
                return Err(Error::new(Code::Conflict, format!("audit entry {number} is not as it was written")));
            }
            before = hash;
        }
        Ok(count)
    }

    fn write(&mut self, work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>) -> Result<(), Error> {
        let write = || -> rusqlite::Result<()> {
            let transaction = self.connection.transaction()?;
            work(&transaction)?;
            transaction.commit()
        };
        write().map_err(|error| unavailable(&error.to_string()))
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

fn log(transaction: &Transaction<'_>, entry: &Entry) -> rusqlite::Result<()> {
    let sql = "SELECT hash FROM audit ORDER BY number DESC LIMIT 1";
    let before = transaction.query_row(sql, [], |row| row.get::<_, String>(0)).optional()?;
    let hash = chained(before.as_deref().unwrap_or(ORIGIN), entry);
    let Entry { at, model, author, action, reason, details } = entry;
    let at = i64::try_from(*at).unwrap_or(i64::MAX);
    transaction.execute(
        "INSERT INTO audit (at, model, author, action, reason, details, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![at, model, author, action, reason, details, hash],
    )?;
    Ok(())
}

fn logged(row: &rusqlite::Row<'_>) -> rusqlite::Result<Logged> {
    let entry = Entry {
        at: row.get::<_, i64>(1)?.max(0) as u64,
        model: row.get(2)?,
        author: row.get(3)?,
        action: row.get(4)?,
        reason: row.get(5)?,
        details: row.get(6)?,
    };
    Ok(Logged { number: row.get::<_, i64>(0)?.max(0) as u64, entry, hash: row.get(7)? })
}

/// The hash of an entry behind the one with the hash `before`: SHA-256, in hexadecimal, of that and of each field, with
/// its length before it, so that no two entries are the same bytes.
fn chained(before: &str, entry: &Entry) -> String {
    let Entry { at, model, author, action, reason, details } = entry;
    let mut hasher = Sha256::new();
    hasher.update(at.to_le_bytes());
    for field in [before, model, author, action, reason, details] {
        hasher.update((field.len() as u64).to_le_bytes());
        hasher.update(field.as_bytes());
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unavailable(reason: &str) -> Error {
    Error::new(Code::NotReady, format!("the server's state cannot be read or stored: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u64) -> Entry {
        Entry {
            at: number,
            model: if number.is_multiple_of(2) { "even" } else { "odd" }.to_owned(),
            author: "somebody".to_owned(),
            action: "advance".to_owned(),
            reason: format!("it was time {number}"),
            details: "{}".to_owned(),
        }
    }

    #[test]
    fn what_is_remembered_outlives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let model = ModelName::parse("m").unwrap();
        for expected in ["m/r1", "m/r2", "m/r3"] {
            let mut store = Store::open(folder.path()).unwrap();
            let known = store.standings().unwrap().pop();
            let mut standing = known.map_or_else(Standing::default, |(_, standing)| standing);
            assert_eq!(&*standing.next_id(&model), expected);
            store.save(&model, &standing, &entry(1)).unwrap();
        }
    }

    #[test]
    fn the_log_can_be_asked_and_verified() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).unwrap();
        assert_eq!(store.verify().unwrap(), 0);
        (1..=10).for_each(|number| store.log(&entry(number)).unwrap());
        assert_eq!(store.verify().unwrap(), 10);
        let found: Vec<u64> = store.audit(Some("odd"), 4, 0, 2).unwrap().iter().map(|logged| logged.number).collect();
        assert_eq!(found, [5, 7]);
        for (change, wrong) in [
            ("UPDATE audit SET reason = 'another' WHERE number = 4", "audit entry 4 is not as it was written"),
            ("DELETE FROM audit WHERE number = 2", "audit entry 2 is missing"),
        ] {
            store.connection.execute(change, []).unwrap();
            let error = store.verify().unwrap_err();
            assert_eq!((error.code, error.message.as_str()), (Code::Conflict, wrong));
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

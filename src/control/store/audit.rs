//! The audit log as a chain: each entry holds the hash of the one before, and the end of the chain is kept beside it.
//!
//! An entry that was changed, taken out or put in later breaks the chain, and one that was cut off at the end is missed
//! by `head`, written with each entry, and by the counter of SQLite, which gives no number twice.
//!
//! The chain has no key. Whoever may write the file can write all of it anew, with every hash, `head` and counter, or
//! put an empty one in its place, and nothing in it will tell. What tells is a hash that was noted down elsewhere: the
//! server's own log has that of each entry, and `verify` takes one.

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params, types::Type};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    error::{Code, Error},
    rollout::Moment,
};

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

/// A log that is as it was written: so many entries, and the hash of the last; empty when there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub entries: u64,
    pub head: String,
}

/// Adds an entry, and moves the chain's end to it.
///
/// It goes on from the end that is kept, not from the last entry there is: where entries were cut off, the gap stays.
pub(super) fn add(transaction: &Transaction<'_>, entry: &Entry) -> rusqlite::Result<Verified> {
    let before = transaction.query_row("SELECT hash FROM head", [], |row| row.get::<_, String>(0)).optional()?;
    let Entry { at, model, author, action, reason, details } = entry;
    let at = i64::try_from(*at).unwrap_or(i64::MAX);
    let before = before.as_deref().unwrap_or(ORIGIN);
    let hash = chained(at, [before, model, author, action, reason, details].map(str::as_bytes));
    transaction.execute(
        "INSERT INTO audit (at, model, author, action, reason, details, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![at, model, author, action, reason, details, hash],
    )?;
    let number = transaction.last_insert_rowid();
    transaction.execute(
        "INSERT INTO head VALUES (1, ?1, ?2) ON CONFLICT (only) DO UPDATE SET number = ?1, hash = ?2",
        params![number, hash],
    )?;
    Ok(Verified { entries: number.max(0) as u64, head: hash })
}

pub(super) fn read(
    connection: &Connection,
    model: Option<&str>,
    since: Moment,
    after: u64,
    most: usize,
) -> rusqlite::Result<Vec<Logged>> {
    let sql = "SELECT number, at, model, author, action, reason, details, hash FROM audit
               WHERE (?1 IS NULL OR model = ?1) AND at >= ?2 AND number > ?3 ORDER BY number LIMIT ?4";
    let mut rows = connection.prepare(sql)?;
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let [since, after] = [since, after].map(|number| i64::try_from(number).unwrap_or(i64::MAX));
    rows.query_map(params![model, since, after, most], logged)?.collect()
}

fn logged(row: &Row<'_>) -> rusqlite::Result<Logged> {
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

/// The outer result says whether the log could be read, the inner one whether it is as it was written.
///
/// Entries are looked at one by one as SQLite hands them out, whatever they say, and all of it is seen as it was at one
/// moment, while a server writes on.
pub(super) fn verify(connection: &Connection, head: Option<&str>) -> rusqlite::Result<Result<Verified, Error>> {
    let snapshot = connection.unchecked_transaction()?;
    let kept = "SELECT number, hash FROM head";
    let kept = snapshot.query_row(kept, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))).optional()?;
    let given = "SELECT seq FROM sqlite_sequence WHERE name = 'audit'";
    let given: i64 = snapshot.query_row(given, [], |row| row.get(0)).optional()?.unwrap_or(0);
    let all = "SELECT number, at, model, author, action, reason, details, hash FROM audit ORDER BY number";
    let mut all = snapshot.prepare(all)?;
    let mut rows = all.query([])?;
    let (mut count, mut last, mut found) = (0_i64, ORIGIN.to_owned(), false);
    while let Some(row) = rows.next()? {
        let number: i64 = row.get(0)?;
        count += 1;
        if number != count {
            let wrong = if number > count { format!("audit entry {count} is missing") } else { too_many(number) };
            return Ok(Err(broken(&wrong)));
        }
        let [model, author, action, reason, details, hash] = [2, 3, 4, 5, 6, 7].map(|index| text(row, index));
        let expected = chained(row.get(1)?, [last.as_bytes(), model?, author?, action?, reason?, details?]);
        if expected.as_bytes() != hash? {
            return Ok(Err(broken(&format!("audit entry {number} is not as it was written"))));
        }
        found |= head == Some(expected.as_str());
        last = expected;
    }
    let (number, hash) = kept.unwrap_or_default();
    let written = number.max(given);
    Ok(if count < written {
        Err(broken(&format!("audit entries are missing at the end: {written} were written, {count} are there")))
    } else if count > number {
        Err(broken(&too_many(count)))
    } else if given != number || hash != last {
        Err(broken("the end of the audit log is not as it was written"))
    } else if let Some(head) = head.filter(|_| !found) {
        Err(broken(&format!(
            "none of {count} audit entries has the hash {head}: it is another log, or was written anew"
        )))
    } else {
        Ok(Verified { entries: count.max(0) as u64, head: last })
    })
}

fn too_many(number: i64) -> String {
    format!("audit entry {number} was put in")
}

fn broken(reason: &str) -> Error {
    Error::new(Code::Conflict, reason)
}

/// The bytes of a column, also of a text that is none.
fn text<'a>(row: &'a Row<'_>, index: usize) -> rusqlite::Result<&'a [u8]> {
    let value = row.get_ref(index)?;
    value.as_bytes().map_err(|error| rusqlite::Error::FromSqlConversionFailure(index, Type::Text, Box::new(error)))
}

/// The hash of an entry: SHA-256, in hexadecimal, of its time and of the hash of the one before and each field, each
/// with its length before it, so that no two entries are the same bytes.
fn chained(at: i64, fields: [&[u8]; 6]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(at.to_le_bytes());
    for field in fields {
        hasher.update((field.len() as u64).to_le_bytes());
        hasher.update(field);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Store;
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

    /// A log whose first entry came in 1970.
    fn log(entries: u64) -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path()).unwrap();
        (0..entries).for_each(|number| store.log(&entry(number)).unwrap());
        (folder, store)
    }

    fn wrong(store: &Store) -> String {
        let error = store.verify(None).unwrap_err();
        assert_eq!(error.code, Code::Conflict, "{error}");
        error.message
    }

    #[test]
    fn the_log_is_asked_by_model_time_and_number() {
        let (_folder, store) = log(10);
        let numbers = |found: Vec<Logged>| found.iter().map(|logged| logged.number).collect::<Vec<_>>();
        assert_eq!(numbers(store.audit(Some("odd"), 4, 0, 2).unwrap()), [6, 8]);
        assert_eq!(numbers(store.audit(None, 0, 8, 10).unwrap()), [9, 10]);
    }

    #[test]
    fn whatever_is_changed_in_the_file_is_noticed() {
        for (change, expected) in [
            ("UPDATE audit SET reason = 'another' WHERE number = 4", "audit entry 4 is not as it was written"),
            (
                "UPDATE audit SET reason = CAST(x'ff' AS TEXT) WHERE number = 4",
                "audit entry 4 is not as it was written",
            ),
            ("UPDATE audit SET at = -at WHERE number = 7", "audit entry 7 is not as it was written"),
            ("UPDATE audit SET at = -1 WHERE number = 1", "audit entry 1 is not as it was written"),
            ("DELETE FROM audit WHERE number = 2", "audit entry 2 is missing"),
            ("UPDATE audit SET number = -1 WHERE number = 1", "audit entry -1 was put in"),
            (
                "DELETE FROM audit WHERE number > 5",
                "audit entries are missing at the end: 10 were written, 5 are there",
            ),
            ("DELETE FROM audit", "audit entries are missing at the end: 10 were written, 0 are there"),
            (
                "DELETE FROM audit WHERE number > 5; UPDATE sqlite_sequence SET seq = 5 WHERE name = 'audit'",
                "audit entries are missing at the end: 10 were written, 5 are there",
            ),
            (
                "DELETE FROM audit WHERE number > 5; DELETE FROM head",
                "audit entries are missing at the end: 10 were written, 5 are there",
            ),
            ("DELETE FROM head", "audit entry 10 was put in"),
            ("UPDATE head SET hash = 'another'", "the end of the audit log is not as it was written"),
            ("DELETE FROM sqlite_sequence", "the end of the audit log is not as it was written"),
        ] {
            let (_folder, store) = log(10);
            assert_eq!(store.verify(None).unwrap().entries, 10);
            store.connection.execute_batch(change).unwrap();
            assert_eq!(wrong(&store), expected, "{change}");
        }
    }

    #[test]
    fn a_cut_tail_is_not_healed_by_what_comes_next() {
        for change in ["DELETE FROM audit WHERE number > 5", "DELETE FROM audit WHERE number > 5; DELETE FROM head"] {
            let (_folder, mut store) = log(10);
            store.connection.execute_batch(change).unwrap();
            store.log(&entry(11)).unwrap();
            assert_eq!(wrong(&store), "audit entry 6 is missing", "{change}");
        }
    }

    #[test]
    fn a_hash_that_was_noted_down_shows_what_the_chain_alone_does_not() {
        let (_folder, mut store) = log(3);
        let noted = store.verify(None).unwrap();
        assert_eq!((noted.entries, noted.head.len()), (3, 64));
        store.log(&entry(4)).unwrap();
        let later = store.verify(Some(&noted.head)).unwrap();
        assert_eq!(later.entries, 4);
        assert_ne!(later.head, noted.head);
        // All of it written anew.
        let (_another, store) = log(2);
        assert!(store.verify(None).is_ok());
        let error = store.verify(Some(&noted.head)).unwrap_err();
        assert_eq!(error.code, Code::Conflict);
        assert!(error.message.contains(&noted.head), "{error}");
        let (_empty, store) = log(0);
        assert_eq!(store.verify(None).unwrap(), Verified::default());
        assert!(store.verify(Some(&noted.head)).is_err());
    }

    #[test]
    fn a_log_that_cannot_be_read_is_not_called_broken() {
        let (_folder, store) = log(1);
        store.connection.execute_batch("DROP TABLE audit").unwrap();
        assert_eq!(store.verify(None).unwrap_err().code, Code::NotReady);
    }
}

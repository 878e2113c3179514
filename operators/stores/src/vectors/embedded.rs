//! The vector store of a process of its own: searched in memory, kept in a [`Database`].
//!
//! Invariant: memory follows the file, commit by commit; what a search finds was committed before. All points are in
//! memory, about 4 bytes a dimension and the payload each, and are read when the store is opened.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use futures::FutureExt;
use redb::{ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use tokio::task::spawn_blocking;

use super::index::{Index, normalised};
use super::{HITS_MAX, Point, SCOPES_MAX, Vectors, check_name, check_points, check_vector};
use crate::error::check_size;
use crate::vectors::Hit;
use crate::{Answer, Database, Error};

/// By group and id: scope, vector (little-endian f32), payload.
type Points<'n> =
    TableDefinition<'n, (&'static str, &'static str), (&'static str, &'static [u8], &'static [u8])>;
/// The length of vectors, once one has fixed it.
type Dimensions<'n> = TableDefinition<'n, (), u64>;

/// A search through so many points, or fewer, is done before another thread would have begun it: about 0.1 ms.
const POINTS_INLINE_MAX: u64 = 1024;

/// A named set of points in a [`Database`].
pub struct Embedded {
    store: Arc<Store>,
}

struct Store {
    database: Database,
    name: String,
    points: String,
    dimensions: String,
    index: RwLock<Index>,
}

impl Embedded {
    /// Opens the set `name`, made if it is not there, and reads it into memory. One set for each embedder.
    pub async fn open(database: &Database, name: &str) -> Result<Self, Error> {
        database.claim(&format!("vectors {name}"))?;
        let store = Arc::new(Store {
            database: database.clone(),
            name: name.to_owned(),
            points: format!("vectors/{name}/points"),
            dimensions: format!("vectors/{name}/dimensions"),
            index: RwLock::default(),
        });
        let this = Arc::clone(&store);
        let made = move |transaction: &WriteTransaction| {
            transaction.open_table(this.points())?;
            transaction.open_table(this.dimensions())?;
            Ok(())
        };
        database.write(0, made, |()| ()).await?;
        let this = Arc::clone(&store);
        database.read(move |redb| this.load(redb)).await?;
        Ok(Self { store })
    }
}

impl Vectors for Embedded {
    fn replace(&self, group: &str, mut points: Vec<Point>) -> Answer<'_, ()> {
        let (store, group) = (Arc::clone(&self.store), group.to_owned());
        async move {
            let bytes = check_points(&group, &points)?;
            for point in &mut points {
                point.vector = normalised(&point.vector);
            }
            let this = Arc::clone(&store);
            let work = move |transaction: &WriteTransaction| {
                if let Err(refused) = this.check_dimensions(transaction, &points)? {
                    return Ok(Err(refused));
                }
                this.put(transaction, &group, &points)?;
                Ok(Ok((group, points)))
            };
            let this = Arc::clone(&store);
            let after = move |written: Result<(String, Vec<Point>), Error>| {
                let (group, points) = written?;
                this.index.write().unwrap_or_else(PoisonError::into_inner).replace(&group, points);
                Ok(())
            };
            store.database.write(bytes, work, after).await?
        }
        .boxed()
    }

    fn search(&self, query: &[f32], scopes: &[&str], limit: usize) -> Answer<'_, Vec<Hit>> {
        let (store, query) = (Arc::clone(&self.store), query.to_vec());
        let mut scopes: Vec<_> = scopes.iter().map(ToString::to_string).collect();
        async move {
            check_vector(&query)?;
            check_size("number of hits", limit, HITS_MAX)?;
            check_size("number of scopes", scopes.len(), SCOPES_MAX)?;
            scopes.iter().try_for_each(|scope| check_name("scope in bytes", scope))?;
            scopes.sort_unstable();
            scopes.dedup();
            if store.is_small() {
                return store.search(&query, &scopes, limit);
            }
            let this = Arc::clone(&store);
            // 100,000 points take milliseconds, in which nothing else would run on this thread.
            let hits = spawn_blocking(move || this.search(&query, &scopes, limit)).await;
            hits.unwrap_or_else(|_| Err(Error::Closed { path: store.database.path().to_owned() }))
        }
        .boxed()
    }

    fn count(&self) -> Answer<'_, u64> {
        let points = self.store.index.read().unwrap_or_else(PoisonError::into_inner).points;
        async move { Ok(points) }.boxed()
    }

    fn clear(&self) -> Answer<'_, ()> {
        let store = Arc::clone(&self.store);
        async move {
            let this = Arc::clone(&store);
            let work = move |transaction: &WriteTransaction| {
                transaction.delete_table(this.points())?;
                transaction.delete_table(this.dimensions())?;
                transaction.open_table(this.points())?;
                transaction.open_table(this.dimensions())?;
                Ok(())
            };
            let this = Arc::clone(&store);
            let after = move |()| {
                *this.index.write().unwrap_or_else(PoisonError::into_inner) = Index::default();
            };
            store.database.write(0, work, after).await
        }
        .boxed()
    }
}

impl Store {
    fn points(&self) -> Points<'_> {
        TableDefinition::new(&self.points)
    }

    fn dimensions(&self) -> Dimensions<'_> {
        TableDefinition::new(&self.dimensions)
    }

    fn load(&self, redb: &redb::Database) -> Result<(), redb::Error> {
        let transaction = redb.begin_read()?;
        let dimensions = transaction.open_table(self.dimensions())?.get(())?.map(|stored| stored.value());
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.dimensions = dimensions.and_then(|dimensions| usize::try_from(dimensions).ok());
        for row in transaction.open_table(self.points())?.iter()? {
            let (key, value) = row?;
            let ((group, id), (scope, vector, payload)) = (key.value(), value.value());
            let vector: Vec<_> =
                vector.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            if Some(vector.len()) != index.dimensions {
                return Err(redb::Error::Corrupted(format!("a vector of another length in {}", self.points)));
            }
            let payload = Bytes::copy_from_slice(payload);
            index.insert(group, Point { id: id.to_owned(), scope: scope.to_owned(), vector, payload });
        }
        Ok(())
    }

    /// In the transaction, because writes that share it may be the first.
    fn check_dimensions(
        &self,
        transaction: &WriteTransaction,
        points: &[Point],
    ) -> Result<Result<(), Error>, redb::Error> {
        let mut table = transaction.open_table(self.dimensions())?;
        let mut expected = table.get(())?.and_then(|stored| usize::try_from(stored.value()).ok());
        for point in points {
            let got = point.vector.len();
            let expected = *expected.get_or_insert(got);
            if got != expected {
                return Ok(Err(Error::Dimensions { store: self.name.clone(), expected, got }));
            }
        }
        if let Some(expected) = expected {
            table.insert((), u64::try_from(expected).unwrap_or(u64::MAX))?;
        }
        Ok(Ok(()))
    }

    fn put(&self, transaction: &WriteTransaction, group: &str, points: &[Point]) -> Result<(), redb::Error> {
        let mut table = transaction.open_table(self.points())?;
        let mut before = Vec::new();
        for row in table.range((group, "")..)? {
            let key = row?.0;
            let (of, id) = key.value();
            if of != group {
                break;
            }
            before.push(id.to_owned());
        }
        for id in &before {
            table.remove((group, id.as_str()))?;
        }
        for point in points {
            let vector: Vec<u8> = point.vector.iter().flat_map(|component| component.to_le_bytes()).collect();
            table.insert(
                (group, point.id.as_str()),
                (point.scope.as_str(), vector.as_slice(), point.payload.as_ref()),
            )?;
        }
        Ok(())
    }

    fn is_small(&self) -> bool {
        self.index.read().unwrap_or_else(PoisonError::into_inner).points <= POINTS_INLINE_MAX
    }

    fn search(&self, query: &[f32], scopes: &[String], limit: usize) -> Result<Vec<Hit>, Error> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        match index.dimensions {
            None => Ok(Vec::new()),
            Some(expected) if expected == query.len() => Ok(index.search(&normalised(query), scopes, limit)),
            Some(expected) => Err(Error::Dimensions { store: self.name.clone(), expected, got: query.len() }),
        }
    }
}

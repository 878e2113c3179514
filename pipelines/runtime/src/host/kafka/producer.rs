//! The producer of a process, and the thread that hears what became of its messages.
//!
//! The binding's own such thread wakes for each acknowledgement, and each wakes who waits for it: at 500 requests/s these were a
//! fifth of all switches between threads. But nearly nobody is in a hurry: the next step has read the message by then, and all that
//! waits is an offset to be stored. So the thread rests while messages are on their way, and tells of all that has come together.
//!
//! Where calls are made somebody nearly always is, and rests that are cut short would cost more than they spare (8%, measured): then it
//! takes each as it comes, for a while.
//!
//! Invariant: what became of a message is told within about [`REST`], and at once while somebody is in a hurry.

use super::client::{log, say};
use rdkafka::{
    ClientConfig, ClientContext, Message as _,
    config::RDKafkaLogLevel,
    error::{KafkaError, KafkaResult},
    message::DeliveryResult,
    producer::{BaseProducer, Producer as _, ProducerContext},
    types::RDKafkaErrorCode,
};
use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, park_timeout},
    time::Duration,
};
use tokio::sync::Notify;

/// How long the thread rests while messages are on their way and nobody is in a hurry. Against what an acknowledgement is for,
/// an offset that is committed four times a second, it is nothing.
const REST: Duration = Duration::from_millis(5);

/// The same where many are: a stage that has a full window waits for them.
const SHORT_REST: Duration = Duration::from_millis(1);

/// So many are many.
const MANY: i32 = 64;

/// How long it takes each as it comes once somebody was in a hurry.
const HURRY: Duration = Duration::from_millis(100);

/// How long it sleeps while none is on its way; librdkafka may have something else to say.
const IDLE: Duration = Duration::from_millis(100);

/// Messages on their way that may be lost; more are lost at once. While a broker is away these are all that wait for it, so the
/// producer's queue has room for what must not be lost.
const LOSSY_MAX: usize = 4096;

/// The producer of a process. Its thread ends with it.
pub struct Producer {
    inner: Arc<BaseProducer<Acknowledgements>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// Messages on their way that somebody waits for in a hurry.
    hurried: Arc<AtomicUsize>,
    /// Whether there was one since the thread looked.
    was_hurried: AtomicBool,
    /// Whether the thread sleeps as nothing is on its way.
    is_idle: AtomicBool,
    has_ended: AtomicBool,
}

impl Producer {
    /// A producer with these settings; connects in the background.
    pub fn new(config: &ClientConfig) -> KafkaResult<Self> {
        let inner = Arc::new(config.create_with_context(Acknowledgements::default())?);
        let shared = Arc::<Shared>::default();
        let listening = (Arc::clone(&inner), Arc::clone(&shared));
        let thread = thread::Builder::new().name("acknowledgements".to_owned());
        let thread = thread.spawn(move || listen(&listening.0, &listening.1));
        let thread = thread.map_err(|fault| KafkaError::ClientCreation(fault.to_string()))?;
        Ok(Self { inner, shared, thread: Some(thread) })
    }

    /// To be held by a message that somebody waits for.
    pub fn hurry(&self) -> Counted {
        self.shared.hurried.fetch_add(1, Ordering::SeqCst);
        self.shared.was_hurried.store(true, Ordering::SeqCst);
        self.wake();
        Counted(Arc::clone(&self.shared.hurried))
    }

    /// To be called when a message is on its way.
    pub fn sent(&self) {
        if self.shared.is_idle.load(Ordering::SeqCst) && self.shared.is_idle.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Deref for Producer {
    type Target = BaseProducer<Acknowledgements>;
    fn deref(&self) -> &Self::Target {
        &self.inner
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // What a panic left unheard, the producer tells when it is dropped.
            let _ = thread.join();
        }
    }
}

fn listen(producer: &BaseProducer<Acknowledgements>, shared: &Shared) {
    let is_hurried =
        || shared.was_hurried.swap(false, Ordering::SeqCst) || shared.hurried.load(Ordering::SeqCst) > 0;
    let heard = || producer.context().heard.load(Ordering::Relaxed);
    while !shared.has_ended.load(Ordering::SeqCst) {
        // Without waiting one event is taken at a time.
        let mut before = None;
        while before != Some(heard()) {
            before = Some(heard());
            producer.poll(Duration::ZERO);
        }
        if is_hurried() {
            producer.poll(HURRY);
            continue;
        }
        match producer.in_flight_count() {
            0 => {
                shared.is_idle.store(true, Ordering::SeqCst);
                // A message sent just before did not see that.
                if producer.in_flight_count() == 0 {
                    park_timeout(IDLE);
                }
                shared.is_idle.store(false, Ordering::SeqCst);
            }
            few if few < MANY => park_timeout(REST),
            _ => park_timeout(SHORT_REST),
        }
    }
}

/// One try to write some messages. Whoever waits for it is woken once, by the last answer: a wake-up of another thread
/// costs more than all else that an acknowledgement does.
pub struct Try {
    /// Messages that are neither acknowledged nor refused.
    unsettled: AtomicUsize,
    refused: Mutex<Vec<(usize, KafkaError)>>,
    /// Of the message that was acknowledged last.
    offset: AtomicI64,
    done: Notify,
}

impl Try {
    /// A try of so many.
    pub fn of(messages: usize) -> Self {
        let (unsettled, offset) = (AtomicUsize::new(messages), AtomicI64::new(-1));
        Self { unsettled, refused: Mutex::default(), offset, done: Notify::new() }
    }

    /// Notes what became of a message: its offset where it is acknowledged.
    pub fn settle(&self, place: usize, result: Result<i64, KafkaError>) {
        match result {
            Ok(offset) => self.offset.store(offset, Ordering::Release),
            Err(fault) => {
                self.refused.lock().unwrap_or_else(PoisonError::into_inner).push((place, fault));
            }
        }
        if self.unsettled.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_one();
        }
    }

    /// The offset of the message that was acknowledged last.
    pub fn offset(&self) -> i64 {
        self.offset.load(Ordering::Acquire)
    }

    /// Waits for the answer to every message, and gives those that were refused, in their order.
    pub async fn settled(&self) -> Vec<(usize, KafkaError)> {
        while self.unsettled.load(Ordering::Acquire) > 0 {
            self.done.notified().await;
        }
        let mut refused = std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        refused.sort_unstable_by_key(|(place, _)| *place);
        refused
    }
}

/// A message on its way.
pub enum Sent {
    /// Somebody waits for its answer, as one of a list.
    Awaited {
        /// The try.
        of: Arc<Try>,
        /// Its place in the list.
        place: usize,
        /// Held where they are in a hurry.
        hurry: Option<Counted>,
    },
    /// It may be lost.
    Lossy(Counted),
}

/// Counted until it is dropped.
pub struct Counted(Arc<AtomicUsize>);

impl Counted {
    /// A place among [`LOSSY_MAX`].
    pub fn lossy(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let free = |taken| (taken < LOSSY_MAX).then_some(taken + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Hears from librdkafka what became of each message.
#[derive(Default)]
pub struct Acknowledgements {
    /// Counts what librdkafka had to say.
    heard: AtomicUsize,
}

impl Acknowledgements {
    fn hear(&self) {
        self.heard.fetch_add(1, Ordering::Relaxed);
    }
}

impl ClientContext for Acknowledgements {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.hear();
        log(level, facility, message);
    }
    fn error(&self, fault: KafkaError, reason: &str) {
        self.hear();
        say(&fault, reason);
    }
}

impl ProducerContext for Acknowledgements {
    type DeliveryOpaque = Box<Sent>;

    fn delivery(&self, result: &DeliveryResult<'_>, sent: Box<Sent>) {
        self.hear();
        let result = match result {
            Ok(message) if message.offset() >= 0 => Ok(message.offset()),
            // Nobody has said that it was written: librdkafka takes it from a later message that was. But a leader which knows nothing of
            // this producer yet takes any sequence number, also where it has just refused the one before (confluent-kafka-go #921).
            // Written once more it may lie there twice, which readers know by its id; not written it would be lost.
            Ok(_) => Err(KafkaError::MessageProduction(RDKafkaErrorCode::Inconsistent)),
            Err((fault, _)) => Err(fault.clone()),
        };
        match *sent {
            Sent::Awaited { of, place, hurry: _held } => of.settle(place, result),
            Sent::Lossy(place) => drop(place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use rdkafka::{mocking::MockCluster, producer::BaseRecord};
    use tokio::time::{sleep, timeout};

    /// Longer than anything here takes, also on a machine that is busy.
    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_try_is_settled_by_the_last_answer_and_gives_back_what_was_refused_in_order() {
        let full = || Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
        let of = Try::of(4);
        of.settle(3, full());
        of.settle(0, Ok(7));
        of.settle(1, full());
        assert!(of.settled().now_or_never().is_none());
        of.settle(2, Ok(8));
        let refused = of.settled().await;
        assert_eq!(refused.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [1, 3]);
        assert!(Try::of(0).settled().await.is_empty());
    }

    #[tokio::test]
    async fn all_are_told_also_behind_a_pause_and_nobody_is_in_a_hurry_for_ever() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("topic", 1, 1).unwrap();
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", cluster.bootstrap_servers());
        let producer = Producer::new(&config).unwrap();
        for is_hurried in [false, true, false, true] {
            let of = Arc::new(Try::of(1));
            let hurry = is_hurried.then(|| producer.hurry());
            let sent = Sent::Awaited { of: Arc::clone(&of), place: 0, hurry };
            let message = BaseRecord::<[u8], [u8], _>::with_opaque_to("topic", Box::new(sent)).payload(b"x");
            producer.send(message).map_err(|(fault, _)| fault).unwrap();
            producer.sent();
            assert!(timeout(LONG, of.settled()).await.expect("told").is_empty());
            assert!(of.offset() >= 0);
            let calm = async {
                while producer.shared.hurried.load(Ordering::SeqCst) > 0 {
                    sleep(REST).await;
                }
            };
            timeout(LONG, calm).await.expect("calm");
            // So that its thread falls asleep.
            sleep(2 * IDLE).await;
        }
    }

    #[test]
    fn of_messages_that_may_be_lost_so_many_are_on_their_way() {
        let taken = Arc::default();
        let mut places: Vec<_> = std::iter::from_fn(|| Counted::lossy(&taken)).collect();
        assert_eq!(places.len(), LOSSY_MAX);
        places.truncate(1);
        assert_eq!(taken.load(Ordering::Acquire), 1);
    }
}

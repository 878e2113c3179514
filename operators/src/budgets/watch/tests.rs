use super::*;
use crate::budgets::Holder;
use proptest::prelude::*;
use std::collections::BTreeSet;

const CENT: u64 = 10_000_000;
const USD: u64 = 100 * CENT;
/// 2026-12-01, 08:00 UTC.
const MORNING_MS: i64 = 1_796_112_000_000;

fn budget(period: Period, limit: u64) -> Budget {
    Budget { holder: Holder::Tenant, of: None, unit: Unit::Money, period, limit }
}

fn rules() -> Rules {
    let ewma = Some(Unusual { percent: 500, floor: 10 * CENT });
    Rules { rate: None, ewma, forecast: false, caps: Vec::new() }
}

fn caps() -> Rules {
    Rules { caps: vec![80, 100], ..Rules::default() }
}

/// Tenants that spend, under counters as a store keeps them.
struct World {
    watch: Watch,
    budgets: Vec<Budget>,
    now_ms: i64,
    read_ms: i64,
    counters: BTreeMap<(String, usize, i64), (u64, u64)>,
}

impl World {
    fn new(budgets: Vec<Budget>, rules: Rules) -> Self {
        let mut watch = Watch::new(budgets.clone(), rules);
        assert_eq!(watch.read(MORNING_MS, &[]), []);
        Self { watch, budgets, now_ms: MORNING_MS, read_ms: MORNING_MS, counters: BTreeMap::new() }
    }

    fn spend(&mut self, tenant: &str, amount: u64) {
        self.count(tenant, amount, 0);
    }

    fn count(&mut self, tenant: &str, amount: u64, refused: u64) {
        for (index, budget) in self.budgets.iter().enumerate() {
            // In the middle of the minute that is read at its end.
            let period = budget.period.at(self.now_ms + MINUTE_MS / 2);
            let counted = self.counters.entry((tenant.to_owned(), index, period)).or_default();
            *counted = (counted.0 + amount, counted.1 + refused);
        }
    }

    fn standings(&self) -> Vec<Standing> {
        let of = |((tenant, budget, period), (used, refused)): (&(String, usize, i64), &(u64, u64))| {
            let periods = [self.read_ms, self.now_ms].map(|ms| self.budgets[*budget].period.at(ms));
            periods.contains(period).then(|| Standing {
                subject: Subject { holder: Holder::Tenant, tenant: Some(tenant.clone()), name: None },
                budget: *budget,
                period: *period,
                used: *used,
                held: 0,
                refused: *refused,
            })
        };
        self.counters.iter().filter_map(of).collect()
    }

    fn read(&mut self) -> Vec<Alert> {
        let standings = self.standings();
        self.read_ms = self.now_ms;
        self.watch.read(self.now_ms, &standings)
    }

    /// What is kept now goes to another process.
    fn restart(&mut self, are_counters_kept: bool) {
        self.go_on(&[self.watch.kept().unwrap()], are_counters_kept);
    }

    /// Another process, which finds this.
    fn go_on(&mut self, kept: &[Vec<Vec<u8>>], are_counters_kept: bool) {
        self.watch = Watch::new(self.budgets.clone(), self.watch.rules.clone());
        self.read_ms = self.watch.go_on(kept, are_counters_kept).unwrap();
    }

    fn minute(&mut self) -> Vec<Alert> {
        self.now_ms += MINUTE_MS;
        self.read()
    }

    /// So many minutes in each of which the tenant spends so much: kind and state of what is told, with the minute.
    fn minutes(&mut self, count: usize, tenant: &str, amount: u64) -> Vec<(usize, String)> {
        let mut told = Vec::new();
        for minute in 1..=count {
            if amount > 0 {
                self.spend(tenant, amount);
            }
            told.extend(self.minute().iter().map(|alert| (minute, word(alert))));
        }
        told
    }
}

fn word(alert: &Alert) -> String {
    format!("{} {}", alert.kind.as_str(), alert.state.as_str())
}

fn at(minute: usize, word: &str) -> (usize, String) {
    (minute, word.to_owned())
}

#[test]
fn a_rate_is_told_once_and_again_when_it_has_been_lower_for_a_while() {
    let mut world =
        World::new(vec![budget(Period::Day, 1_000 * USD)], Rules { rate: Some(USD), ..Rules::default() });
    assert_eq!(world.minutes(5, "a", USD), [], "as much as may be");
    assert_eq!(world.minutes(5, "a", 2 * USD), [at(1, "rate firing")]);
    assert_eq!(world.minutes(5, "a", 90 * CENT), [], "it swings around it");
    assert_eq!(world.minutes(2, "a", 0), []);
    assert_eq!(world.minutes(1, "a", 2 * USD), []);
    assert_eq!(world.minutes(5, "a", 0), [at(3, "rate resolved")]);
    assert_eq!(world.minutes(1, "a", 2 * USD), [at(1, "rate firing")]);
}

#[test]
fn an_alert_says_who_spent_what_and_its_end_has_its_id() {
    let mut world =
        World::new(vec![budget(Period::Day, 100 * USD)], Rules { rate: Some(USD), ..Rules::default() });
    world.spend("acme", 150 * CENT);
    let fired = world.minute().remove(0);
    let began_at = (MORNING_MS + MINUTE_MS) * 1_000;
    assert_eq!((fired.seen_at, fired.began_at), (began_at, began_at));
    assert_eq!(
        (fired.value, fired.threshold, fired.used, fired.limit),
        (150 * CENT, USD, 150 * CENT, 100 * USD)
    );
    assert_eq!(
        (fired.holder.as_str(), fired.tenant.as_ref().unwrap().as_str(), fired.budget.as_str()),
        ("tenant", "acme", "100 USD/day")
    );
    assert_eq!(fired.message, "tenant \"acme\" spent $1.50 in a minute; beyond $1.00 it is told");
    assert_eq!((world.minute(), world.minute()), (vec![], vec![]));
    let over = world.minute().remove(0);
    assert_eq!((over.state, over.id, over.began_at), (AlertState::Resolved, fired.id, began_at));
    assert_eq!(over.message, "tenant \"acme\": rate is over");
}

#[test]
fn what_is_unusual_is_told_and_neither_first_minutes_nor_cents_are() {
    let mut world = World::new(vec![budget(Period::Day, 10_000 * USD)], rules());
    assert_eq!(world.minutes(1, "a", CENT), []);
    assert_eq!(world.minutes(8, "a", USD), [], "nobody knows yet what is usual");
    let mut world = World::new(vec![budget(Period::Day, 10_000 * USD)], rules());
    assert_eq!(world.minutes(20, "a", 10 * CENT), []);
    assert_eq!(world.minutes(1, "a", 50 * CENT), [], "five times as much and no more");
    // The average is 12.6 cents by now.
    assert_eq!(world.minutes(3, "a", 80 * CENT), [at(1, "ewma firing")]);
    // What goes on becomes usual, slowly.
    let told = world.minutes(60, "a", 80 * CENT);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].1, "ewma resolved");
    assert_eq!(world.minutes(30, "b", CENT / 10), []);
    assert_eq!(world.minutes(1, "b", 9 * CENT), [], "ninety times next to nothing");
}

#[test]
fn a_quiet_night_makes_no_morning_unusual() {
    let mut world = World::new(vec![budget(Period::Month, 10_000 * USD)], rules());
    assert_eq!(world.minutes(60, "a", 40 * CENT), []);
    assert_eq!(world.minutes(15 * 60, "a", 0), []);
    assert_eq!(world.minutes(60, "a", 40 * CENT), []);
    assert_eq!(world.minutes(1, "a", 5 * USD), [at(1, "ewma firing")]);
}

#[test]
fn a_budget_that_does_not_last_its_day_is_told_with_when_it_is_used_up() {
    let rules = Rules { forecast: true, ..Rules::default() };
    let mut world = World::new(vec![budget(Period::Day, 20 * USD)], rules.clone());
    // 16 hours at 2 cents are 19.2 dollars.
    assert_eq!(world.minutes(30, "a", 2 * CENT), []);
    let mut told = Vec::new();
    for _ in 0..10 {
        world.spend("a", 10 * CENT);
        told.extend(world.minute());
    }
    assert_eq!(told.iter().map(word).collect::<Vec<_>>(), ["forecast firing"]);
    let Alert { seen_at, pace, used, reached_at, value, threshold, message, .. } = told.remove(0);
    let minutes = i64::try_from((20 * USD - used) / pace).unwrap();
    assert_eq!(reached_at, Some(seen_at + minutes * 60_000_000));
    assert!(value > threshold && threshold == 20 * USD);
    assert!(message.contains(&format!("its budget of 20 USD/day in {minutes} minutes")), "{message}");
    let told = world.minutes(60, "a", 0);
    assert_eq!(told.iter().map(|(_, word)| word.as_str()).collect::<Vec<_>>(), ["forecast resolved"]);

    let mut world = World::new(vec![budget(Period::Month, 400 * USD), budget(Period::Minute, USD)], rules);
    assert_eq!(
        world.minutes(20, "a", 2 * CENT).len(),
        1,
        "31 days at 2 cents a minute; and no minute is forecast"
    );
}

#[test]
fn parts_of_a_budget_are_told_once_each_until_the_next_day() {
    let mut world = World::new(vec![budget(Period::Day, 10 * USD)], caps());
    assert_eq!(world.minutes(7, "a", USD), []);
    world.spend("a", USD);
    let first = world.minute();
    assert_eq!(
        (first[0].value, first[0].threshold, word(&first[0])),
        (8 * USD, 8 * USD, "cap firing".to_owned())
    );
    assert_eq!(world.minutes(1, "a", USD), []);
    // There is no room for more, though not all is used.
    world.count("a", 0, 3);
    let second = world.minute();
    assert_eq!((second[0].value, second[0].threshold, &second[0].id), (9 * USD, 10 * USD, &first[0].id));
    assert!(second[0].message.ends_with("its budget of 10 USD/day used and held, and calls are refused"));
    // It began at 08:08; the day ends after 16 hours.
    let told = world.minutes(16 * 60, "a", 0);
    assert_eq!(told.iter().map(|(_, word)| word.as_str()).collect::<Vec<_>>(), ["cap resolved"]);
    let told = world.minutes(8, "a", USD);
    assert_eq!(told, [at(8, "cap firing")]);
}

#[test]
fn a_budget_a_minute_that_is_always_full_is_told_once() {
    let mut world = World::new(vec![budget(Period::Minute, USD)], caps());
    assert_eq!(world.minutes(30, "a", USD), [at(1, "cap firing")]);
    assert_eq!(world.minutes(5, "a", 0), [at(3, "cap resolved")]);
}

#[test]
fn money_is_told_of_one_budget_and_tokens_of_none() {
    let tokens = Budget { unit: Unit::Tokens, ..budget(Period::Day, 1_000_000 * USD) };
    let budgets = vec![tokens, budget(Period::Month, 1_000 * USD), budget(Period::Day, 1_000 * USD)];
    let mut world = World::new(budgets, Rules { rate: Some(USD), ..Rules::default() });
    world.spend("a", 2 * USD);
    let told = world.minute();
    assert_eq!(told.iter().map(|alert| alert.budget.as_str()).collect::<Vec<_>>(), ["1000 USD/month"]);
}

#[test]
fn what_is_spent_over_midnight_is_counted_once() {
    let mut world =
        World::new(vec![budget(Period::Day, 1_000 * USD)], Rules { rate: Some(3 * USD), ..Rules::default() });
    world.minutes(16 * 60 - 1, "a", CENT);
    // Of what is read at once both days have a part.
    world.spend("a", 2 * USD);
    world.now_ms += MINUTE_MS;
    world.spend("a", 2 * USD);
    let told = world.read();
    assert_eq!((told[0].value, told[0].used), (4 * USD, 2 * USD));
    assert_eq!(world.minutes(1, "a", 2 * USD), []);
}

#[test]
fn a_clock_that_is_set_back_makes_nobody_spend() {
    let rules = Rules { rate: Some(USD), ..caps() };
    let mut world = World::new(vec![budget(Period::Day, 100 * USD)], rules);
    assert_eq!(world.minutes(10, "a", USD), []);
    world.spend("a", 50 * USD);
    // Over midnight, to a day of its own.
    world.now_ms -= 9 * 60 * MINUTE_MS;
    assert_eq!(world.read(), [], "counting begins anew");
    assert_eq!(world.minutes(3, "a", USD), []);
    assert_eq!(world.minutes(1, "a", 2 * USD), [at(1, "rate firing")]);
    assert_eq!(world.read(), [], "no time has passed");
}

#[test]
fn a_late_reading_stands_for_all_of_its_minutes() {
    let mut world =
        World::new(vec![budget(Period::Day, 1_000 * USD)], Rules { rate: Some(USD), ..Rules::default() });
    world.spend("a", 5 * USD);
    world.now_ms += 9 * MINUTE_MS;
    assert_eq!(world.minute(), [], "half a dollar a minute");
    world.spend("a", 5 * USD);
    world.now_ms += MINUTE_MS;
    assert_eq!(world.minute().iter().map(|alert| alert.value).collect::<Vec<_>>(), [250 * CENT]);
}

#[test]
fn after_a_restart_what_is_so_is_told_again_under_its_id_and_nothing_is_unusual() {
    let rules = Rules { caps: vec![80, 100], ..rules() };
    let mut world = World::new(vec![budget(Period::Day, 100 * USD)], rules.clone());
    assert_eq!(world.minutes(15, "a", USD), []);
    world.spend("a", 70 * USD);
    let before = world.minute();
    assert_eq!(before.iter().map(word).collect::<Vec<_>>(), ["ewma firing", "cap firing"]);
    // Another process that reads the same counters.
    world.watch = Watch::new(world.budgets.clone(), rules);
    assert_eq!(world.read(), []);
    world.spend("a", USD);
    let after = world.minute();
    assert_eq!(after.iter().map(word).collect::<Vec<_>>(), ["cap firing"]);
    assert_eq!(after[0].id, before[1].id);
    // Counters in memory begin at 0.
    world.counters.clear();
    assert_eq!(world.minutes(5, "a", USD), [at(3, "cap resolved")]);
}

#[test]
fn what_is_usual_outlives_a_process() {
    let mut world = World::new(vec![budget(Period::Day, 10_000 * USD)], rules());
    assert_eq!(world.minutes(9, "a", 10 * CENT), []);
    world.restart(true);
    assert_eq!(world.minutes(1, "a", 10 * CENT), []);
    world.restart(true);
    assert_eq!(world.minutes(1, "a", 80 * CENT), [at(1, "ewma firing")]);
    world.restart(true);
    let told = world.minutes(10, "a", 10 * CENT);
    assert_eq!(told, [at(3, "ewma resolved")], "it had been told that it is so");

    // Counters that begin at 0 with the process.
    let mut world = World::new(vec![budget(Period::Day, 10_000 * USD)], rules());
    assert_eq!(world.minutes(20, "a", 10 * CENT), []);
    world.counters.clear();
    world.restart(false);
    assert_eq!(world.minutes(1, "a", 40 * CENT), [], "less than was used before");
    world.counters.clear();
    world.restart(false);
    world.spend("a", 90 * CENT);
    let told = world.minute();
    assert_eq!((told[0].kind, told[0].value), (AlertKind::Ewma, 90 * CENT), "all of it was spent since");
}

#[test]
fn minutes_without_a_process_are_minutes_in_which_what_was_spent_was_spent_evenly() {
    let rules = Rules { rate: Some(USD), forecast: true, ..Rules::default() };
    // Alike but for who read it: a process that stood still, and one that was started again.
    let mut worlds = [false, true].map(|is_restarted| {
        let mut world = World::new(vec![budget(Period::Day, 400 * USD)], rules.clone());
        assert_eq!(world.minutes(30, "a", 30 * CENT), []);
        let kept = [world.watch.kept().unwrap()];
        world.now_ms += 9 * MINUTE_MS;
        world.spend("a", 5 * USD);
        if is_restarted {
            world.go_on(&kept, true);
        }
        assert_eq!(world.minute(), [], "half a dollar a minute");
        world
    });
    let pace = |world: &World| world.watch.watched.values().next().unwrap().counts.pace.value;
    assert_eq!(pace(&worlds[0]), pace(&worlds[1]));
    assert!((30 * CENT..50 * CENT).contains(&pace(&worlds[0])));
    // A night without anybody leaves no pace, and what is usual of a minute with calls stays.
    let world = &mut worlds[1];
    let usual = |world: &World| world.watch.watched.values().next().unwrap().counts.usual.value;
    let before = usual(world);
    world.now_ms += 9 * 60 * MINUTE_MS;
    world.restart(true);
    world.minute();
    assert_eq!(usual(world), before);
    assert!(pace(world) < CENT);
}

#[test]
fn what_was_kept_is_whole_or_not_used() {
    let mut world = World::new(vec![budget(Period::Day, 10_000 * USD)], rules());
    for tenant in 0..2 * PART_MAX {
        world.spend(&format!("t{tenant}"), CENT);
    }
    world.minute();
    let before = world.watch.kept().unwrap();
    world.spend("one more", CENT);
    world.minute();
    let now = world.watch.kept().unwrap();
    assert_eq!((before.len(), now.len()), (2, 3));
    let read_ms = |kept: &[&[&Vec<u8>]]| {
        let kept: Vec<Vec<&Vec<u8>>> = kept.iter().map(|parts| parts.to_vec()).collect();
        let mut watch = Watch::new(world.budgets.clone(), rules());
        let read_ms = watch.go_on(&kept, true);
        assert_eq!(read_ms.is_some(), !watch.watched.is_empty());
        read_ms.map(|read_ms| (read_ms, watch.watched.len()))
    };
    let (old, new) = (world.now_ms - MINUTE_MS, world.now_ms);
    let [a, b, x, y, z] = [&before[0], &before[1], &now[0], &now[1], &now[2]];
    assert_eq!(read_ms(&[&[a, b], &[x, y, z]]), Some((new, 2 * PART_MAX + 1)));
    assert_eq!(read_ms(&[&[x, y], &[a, b]]), Some((old, 2 * PART_MAX)), "cut off while it was written");
    assert_eq!(read_ms(&[&[a, b, z]]), Some((old, 2 * PART_MAX)), "of a larger one before");
    assert_eq!(read_ms(&[&[x, b, z], &[]]), None);
    assert_eq!(read_ms(&[&[&b"{}".to_vec()]]), None);
}

#[test]
fn under_other_settings_averages_stay_and_what_is_so_is_told_again() {
    let mut world = World::new(vec![budget(Period::Day, 10 * USD)], Rules { caps: vec![80, 100], ..rules() });
    assert_eq!(world.minutes(11, "a", 30 * CENT), []);
    assert_eq!(world.minutes(1, "a", 6 * USD), [at(1, "ewma firing"), at(1, "cap firing")]);
    let kept = [world.watch.kept().unwrap()];
    // The same budget with more room, behind others.
    let own = Budget { of: Some("b".to_owned()), ..budget(Period::Day, USD) };
    let budgets = vec![budget(Period::Month, 900 * USD), own, budget(Period::Day, 100 * USD)];
    world.counters = std::mem::take(&mut world.counters)
        .into_iter()
        .map(|((tenant, _, period), counted)| ((tenant, 2, period), counted))
        .collect();
    world.budgets = budgets;
    world.watch.rules.caps = vec![9, 100];
    world.go_on(&kept, true);
    world.counters.values_mut().for_each(|(used, _)| *used += 9 * USD);
    world.now_ms += MINUTE_MS;
    let told: Vec<_> = world.read().iter().map(|alert| (word(alert), alert.budget.clone())).collect();
    let expected = ["ewma firing", "cap firing"].map(|word| (word.to_owned(), "100 USD/day".to_owned()));
    assert_eq!(told, expected);
}

#[test]
fn of_thousands_that_cross_at_once_each_is_told_once_and_never_too_many_at_a_time() {
    let mut world = World::new(vec![budget(Period::Day, USD)], caps());
    let tenants: Vec<_> = (0..2_500).map(|tenant| format!("t{tenant}")).collect();
    for tenant in &tenants {
        world.spend(tenant, USD);
    }
    let told: Vec<Vec<Alert>> = (0..5).map(|_| world.minute()).collect();
    assert_eq!(told.iter().map(Vec::len).collect::<Vec<_>>(), [997, 997, 506, 0, 0]);
    let ids: BTreeSet<_> = told.iter().flatten().map(|alert| &alert.id).collect();
    assert_eq!(ids.len(), tenants.len());
}

#[test]
fn who_has_not_been_seen_for_a_day_is_forgotten_and_more_than_fit_are_left_out() {
    let mut world = World::new(vec![budget(Period::Day, USD)], caps());
    world.spend("a", CENT);
    world.minute();
    assert_eq!(world.watch.watched.len(), 1);
    world.counters.clear();
    world.minutes(24 * 60, "b", CENT);
    let left: Vec<_> =
        world.watch.watched.keys().map(|(subject, _)| subject.tenant.clone().unwrap()).collect();
    assert_eq!(left, ["b"]);
    for tenant in 0..WATCHED_MAX {
        world.spend(&format!("t{tenant}"), CENT);
    }
    world.minute();
    assert_eq!((world.watch.watched.len(), world.watch.left_out()), (WATCHED_MAX, 1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is spent: what begins ends once, nothing is told twice in a minute, and the same readings give the same, also to processes
    /// that each go on from the one before.
    #[test]
    fn alerts_begin_and_end_in_turn(
        minutes in prop::collection::vec(
            (0_i64..4, 0..4_u8, prop::collection::vec((0..3_usize, 0..30_u64, 0..2_u64), 0..6)), 1..200),
    ) {
        let budgets = vec![budget(Period::Day, 20 * USD), budget(Period::Minute, USD), budget(Period::Month, 30 * USD)];
        let rules = Rules { rate: Some(80 * CENT), forecast: true, caps: vec![50, 80, 100], ..rules() };
        let (mut world, mut other) = (World::new(budgets.clone(), rules.clone()), Watch::new(budgets.clone(), rules.clone()));
        other.read(MORNING_MS, &[]);
        let mut firing = BTreeSet::new();
        for (late, restart, spent) in minutes {
            if restart == 0 {
                let kept = other.kept().unwrap();
                other = Watch::new(budgets.clone(), rules.clone());
                prop_assert_eq!(other.go_on(&[kept], true), Some(world.now_ms));
            }
            for (tenant, cents, refused) in spent {
                world.count(["a", "b", "c"][tenant], cents * cents * CENT / 8, refused);
            }
            world.now_ms += late * MINUTE_MS;
            world.now_ms += MINUTE_MS;
            let standings = world.standings();
            let alerts = world.read();
            prop_assert_eq!(&alerts, &other.read(world.now_ms, &standings));
            let mut once = BTreeSet::new();
            for alert in alerts {
                let what = (alert.kind, alert.tenant.clone().map(|tenant| tenant.as_str().to_owned()), alert.budget.clone());
                prop_assert!(once.insert(what.clone()), "twice in a minute: {:?}", what);
                match alert.state {
                    AlertState::Firing => prop_assert!(firing.insert(what) || alert.kind == AlertKind::Cap),
                    AlertState::Resolved => prop_assert!(firing.remove(&what), "it had not begun"),
                }
            }
        }
    }
}

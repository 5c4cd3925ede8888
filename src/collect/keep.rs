//! Which snapshots of a folder rules keep. Pure: times in, reasons out.
//!
//! What time it is now plays no part, so a clock that is wrong expires nothing: a rule keeps the newest snapshot of each
//! of the newest N hours, days, ... in which there are any.

use jiff::tz::TimeZone;
use serde::Serialize;

use crate::clock::Timestamp;

/// How many snapshots each rule keeps at the most; 0 is no rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    /// The newest.
    pub last: u32,
    /// The newest of as many hours.
    pub hourly: u32,
    /// The newest of as many days.
    pub daily: u32,
    /// The newest of as many weeks, which begin on Monday.
    pub weekly: u32,
    /// The newest of as many months.
    pub monthly: u32,
    /// The newest of as many years.
    pub yearly: u32,
}

/// One of the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "named as the fields of `Rules`")]
pub enum Rule {
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

impl Rules {
    /// Each rule, and how many it keeps.
    pub fn all(&self) -> [(Rule, u32); 6] {
        [
            (Rule::Last, self.last),
            (Rule::Hourly, self.hourly),
            (Rule::Daily, self.daily),
            (Rule::Weekly, self.weekly),
            (Rule::Monthly, self.monthly),
            (Rule::Yearly, self.yearly),
        ]
    }

    /// Whether they would keep nothing.
    pub fn is_empty(&self) -> bool {
        self.all().iter().all(|(_, count)| *count == 0)
    }

    /// Which rules keep each of these snapshots, which must be in their order, the newest first. Hours, days and so on
    /// are those of `zone`.
    pub fn judge(&self, newest_first: &[Timestamp], zone: &TimeZone) -> Vec<Vec<Rule>> {
        let mut reasons = vec![Vec::new(); newest_first.len()];
        for (rule, count) in self.all() {
            let mut left = count;
            let mut kept = None;
            for (at, (time, reasons)) in newest_first.iter().zip(&mut reasons).enumerate() {
                let bucket = rule.bucket(at, *time, zone);
                if left > 0 && kept != Some(bucket) {
                    kept = Some(bucket);
                    left -= 1;
                    reasons.push(rule);
                }
            }
        }
        reasons
    }
}

impl Rule {
    /// The word of its option and of reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }

    /// What tells the hour, day, ... of a time from the one before.
    fn bucket(self, at: usize, time: Timestamp, zone: &TimeZone) -> (i64, i64) {
        // Times are of our own type: none is out of the calendar's range.
        let seconds = i64::try_from(time.seconds()).unwrap_or(i64::MAX);
        let time = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX).to_zoned(zone.clone());
        let date = time.date();
        let year = i64::from(date.year());
        match self {
            Self::Last => (at as i64, 0),
            Self::Hourly => {
                // When clocks are put back, the same hour comes twice.
                let offset = i64::from(time.offset().seconds());
                (time.timestamp().as_second().saturating_add(offset).div_euclid(3600), offset)
            }
            Self::Daily => (year, i64::from(date.day_of_year())),
            Self::Weekly => {
                let week = date.iso_week_date();
                (i64::from(week.year()), i64::from(week.week()))
            }
            Self::Monthly => (year, i64::from(date.month())),
            Self::Yearly => (year, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn berlin() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    fn time(text: &str) -> Timestamp {
        let time: jiff::Timestamp = text.parse().unwrap();
        Timestamp(time.as_second() as u64 * 1_000_000_000)
    }

    /// The reasons for each of these times, given the oldest first.
    fn judged(rules: Rules, oldest_first: &[&str]) -> Vec<String> {
        let times: Vec<_> = oldest_first.iter().rev().map(|t| time(t)).collect();
        let mut reasons = rules.judge(&times, &berlin());
        reasons.reverse();
        reasons.iter().map(|r| r.iter().map(|r| r.word()).collect::<Vec<_>>().join(" ")).collect()
    }

    #[test]
    fn the_newest_of_each_day_is_kept_by_local_days() {
        // Midnight in Berlin is at 23:00 UTC in winter.
        let times = ["2026-11-20T12:00:00Z", "2026-11-20T22:59:00Z", "2026-11-20T23:01:00Z", "2026-11-21T22:00:00Z"];
        let daily = Rules { daily: 7, ..Rules::default() };
        assert_eq!(judged(daily, &times), ["", "daily", "", "daily"]);
        assert_eq!(judged(Rules { daily: 1, last: 2, ..daily }, &times), ["", "", "last", "last daily"]);
    }

    #[test]
    fn an_hour_that_comes_twice_is_two_and_the_day_is_one() {
        // On 2026-10-25 clocks go from 03:00 back to 02:00, which is 01:00 UTC.
        let times = ["2026-10-24T23:30:00Z", "2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T22:59:00Z"];
        let hourly = Rules { hourly: 9, ..Rules::default() };
        assert_eq!(judged(hourly, &times), ["hourly", "hourly", "hourly", "hourly"]);
        // All four are of the 25th there: from 01:30 to 23:59.
        let daily = Rules { daily: 9, ..Rules::default() };
        assert_eq!(judged(daily, &times), ["", "", "", "daily"]);
        // And of the day in spring that has 23 hours.
        let spring = ["2026-03-28T22:59:00Z", "2026-03-28T23:00:00Z", "2026-03-29T21:59:00Z", "2026-03-29T22:00:00Z"];
        assert_eq!(judged(daily, &spring), ["daily", "", "daily", "daily"]);
    }

    #[test]
    fn weeks_begin_on_monday_and_belong_to_one_year() {
        // 2026-12-31 is a Thursday: its week has days of two years.
        let times = ["2026-12-27T12:00:00Z", "2026-12-28T12:00:00Z", "2027-01-03T12:00:00Z", "2027-01-04T12:00:00Z"];
        let rules = Rules { weekly: 9, ..Rules::default() };
        assert_eq!(judged(rules, &times), ["weekly", "", "weekly", "weekly"]);
        let rules = Rules { monthly: 9, yearly: 9, ..Rules::default() };
        assert_eq!(judged(rules, &times), ["", "monthly yearly", "", "monthly yearly"]);
    }

    #[test]
    fn a_clock_that_was_wrong_for_a_while_expires_nothing() {
        // The third was made while the clock stood at 1970, the fourth while it stood in the future.
        let times = [
            "2026-11-18T12:00:00Z",
            "2026-11-19T12:00:00Z",
            "1970-01-01T00:00:00Z",
            "2099-01-01T00:00:00Z",
            "2026-11-22T12:00:00Z",
        ];
        let rules = Rules { daily: 5, ..Rules::default() };
        assert_eq!(judged(rules, &times), ["daily"; 5]);
    }

    #[test]
    fn no_time_is_out_of_the_calendar() {
        let times = [Timestamp(u64::MAX), Timestamp(0)];
        let rules = Rules { last: 1, hourly: 1, daily: 1, weekly: 1, monthly: 1, yearly: 1 };
        for zone in [TimeZone::UTC, berlin(), TimeZone::posix("XXX-24").unwrap(), TimeZone::posix("XXX24").unwrap()] {
            assert_eq!(rules.judge(&times, &zone)[0].len(), 6);
        }
    }

    fn rules() -> impl Strategy<Value = Rules> {
        [0..5u32, 0..5, 0..5, 0..5, 0..5, 0..5].prop_map(|[last, hourly, daily, weekly, monthly, yearly]| Rules {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
        })
    }

    /// Times in order, or in none: clocks go wrong.
    fn times() -> impl Strategy<Value = Vec<Timestamp>> {
        let steps = prop::collection::vec(prop_oneof![0..7200u64, 0..200_000u64, 0..20_000_000u64], 0..60);
        let ordered = steps.prop_map(|steps| {
            let mut at = 1_900_000_000u64;
            let times = steps.iter().map(|step| {
                at -= step;
                Timestamp(at * 1_000_000_000)
            });
            times.collect()
        });
        let wild = prop::collection::vec((0..4_000_000_000u64).prop_map(|s| Timestamp(s * 1_000_000_000)), 0..40);
        prop_oneof![3 => ordered, 1 => wild]
    }

    fn kept(rules: &Rules, times: &[Timestamp]) -> Vec<usize> {
        let reasons = rules.judge(times, &berlin());
        reasons.iter().enumerate().filter(|(_, r)| !r.is_empty()).map(|(at, _)| at).collect()
    }

    proptest! {
        #[test]
        fn any_rule_keeps_the_newest_and_never_more_than_it_may(rules in rules(), times in times()) {
            let reasons = rules.judge(&times, &berlin());
            prop_assert_eq!(reasons.len(), times.len());
            for (rule, count) in rules.all() {
                let by_rule = reasons.iter().filter(|r| r.contains(&rule)).count();
                prop_assert!(by_rule <= count as usize);
                prop_assert!(count == 0 || times.is_empty() || reasons[0].contains(&rule));
            }
            let last = (rules.last as usize).min(times.len());
            prop_assert!(reasons[..last].iter().all(|r| r.contains(&Rule::Last)));
        }

        #[test]
        fn more_is_never_less(rules in rules(), more in rules(), times in times()) {
            let both = Rules {
                last: rules.last + more.last,
                hourly: rules.hourly + more.hourly,
                daily: rules.daily + more.daily,
                weekly: rules.weekly + more.weekly,
                monthly: rules.monthly + more.monthly,
                yearly: rules.yearly + more.yearly,
            };
            let many = kept(&both, &times);
            prop_assert!(kept(&rules, &times).iter().all(|at| many.contains(at)));
        }

        #[test]
        fn a_second_time_nothing_more_goes(rules in rules(), times in times()) {
            let left: Vec<Timestamp> = kept(&rules, &times).into_iter().map(|at| times[at]).collect();
            prop_assert_eq!(kept(&rules, &left).len(), left.len());
        }
    }
}

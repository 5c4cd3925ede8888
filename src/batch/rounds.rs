//! Rounds: a source must stay as it is from its scan until it is written, so a long batch is cut into rounds, each from
//! scan to commit. Pure.

/// Deals VMs of these sizes out to so many rounds, largest first, each to the round that has least so far: then no round
/// is longer than twice the best possible. Returns each VM's round.
pub fn deal(sizes: &[u64], rounds: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|at| (std::cmp::Reverse(sizes.get(*at).copied()), *at));
    let mut loads = vec![0_u64; rounds.max(1)];
    let mut round_of = vec![0; sizes.len()];
    for vm in order {
        let least = loads.iter().enumerate().min_by_key(|(_, load)| **load).map_or(0, |(at, _)| at);
        if let (Some(load), Some(round), Some(size)) = (loads.get_mut(least), round_of.get_mut(vm), sizes.get(vm)) {
            *load = load.saturating_add((*size).max(1));
            *round = least;
        }
    }
    round_of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_have_about_the_same_load() {
        assert_eq!(deal(&[5, 40, 10, 20, 15], 2), [0, 0, 1, 1, 1]);
        assert_eq!(deal(&[], 3), [0_usize; 0]);
        assert_eq!(deal(&[0, 0, 0], 3), [0, 1, 2], "empty sources take a place, too");
        for rounds in 1..8 {
            let sizes: Vec<u64> = (0..40).map(|n| n * n % 97).collect();
            let dealt = deal(&sizes, rounds);
            let mut loads = vec![0; rounds];
            sizes.iter().zip(&dealt).for_each(|(size, round)| loads[*round] += size);
            let best = (sizes.iter().sum::<u64>() / rounds as u64).max(96);
            assert!(loads.iter().all(|load| *load <= 2 * best), "{loads:?}");
        }
    }
}
